// The canonical form of an id; torchrec_kvshare/features/ids.py defines it.

#pragma once

#include "strict_json.h"

#include <string>

// Of a string, a number or a boolean. Empty for a blank string and for anything else.
std::string canonical_id(const Json& value);

// Of a UTF-8 string.
std::string canonical_id(const std::string& text);
