// Reads JSON as Python's reader of requests does: a duplicate key in an object is an error, and an
// integer of any length keeps its digits. Deep nesting and objects with too many keys are refused.

#pragma once

#include <nlohmann/json_fwd.hpp>

#include <stdexcept>
#include <string>

using Json = nlohmann::json;

struct JsonError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws JsonError.
Json read_json(const std::string& text);

// Digits of an integer beyond 64 bits, which the JSON library has no type for; empty for others.
std::string long_integer(const Json& value);

// A JSON string on one line, in ASCII, for any bytes.
std::string json_string(const std::string& text);
