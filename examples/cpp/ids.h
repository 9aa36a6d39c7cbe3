// The canonical form of an id, and its code; torchrec_kvshare/features/ids.py and hashing.py define
// them.

#pragma once

#include "strict_json.h"

#include <cstdint>
#include <string>

// Of a string, a number or a boolean. Empty for a blank string and for anything else.
std::string canonical_id(const Json& value);

// Of a UTF-8 string.
std::string canonical_id(const std::string& text);

// 64-bit FNV-1a of the bytes.
uint64_t fnv1a(const std::string& bytes);

// The code of a canonical id, from 0 to 2^62 - 1.
int64_t code_of(const std::string& id);

// A row by the hash of a code, from 0 to num_rows - 1.
int64_t hashed_row(int64_t code, int64_t num_rows, int64_t salt);
