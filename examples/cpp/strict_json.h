// JSON as Python's reader has it, without what readers let pass in silence: a key that stands twice
// in one object is an error, and an integer of any length keeps its digits. Deep nesting and objects
// of very many keys are refused.

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

// Digits of an integer beyond 64 bits, which is no number to the JSON library; empty for others.
std::string long_integer(const Json& value);

// A text on one line, in ASCII, whatever its bytes.
std::string json_string(const std::string& text);
