// How an id is spelt; torchrec_kvshare/features/ids.py is the meaning.

#pragma once

#include "strict_json.h"

#include <string>

// Of a text, a number or a boolean. Empty where there is no id: of a blank text, and of anything
// else.
std::string canonical_id(const Json& value);

// Of a text, UTF-8.
std::string canonical_id(const std::string& text);
