#include "ids.h"

#include <nlohmann/json.hpp>

#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace {

// The whitespace that Python's str.strip removes.
constexpr std::string_view kSpaces[] = {
    "\t", "\n", "\v", "\f", "\r", "\x1c", "\x1d", "\x1e", "\x1f", " ",
    "\xc2\x85", "\xc2\xa0", "\xe1\x9a\x80", "\xe2\x80\x80", "\xe2\x80\x81", "\xe2\x80\x82",
    "\xe2\x80\x83", "\xe2\x80\x84", "\xe2\x80\x85", "\xe2\x80\x86", "\xe2\x80\x87", "\xe2\x80\x88",
    "\xe2\x80\x89", "\xe2\x80\x8a", "\xe2\x80\xa8", "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f",
    "\xe3\x80\x80"};

bool is_digit(char c) { return '0' <= c && c <= '9'; }

bool is_visible_ascii(char c) { return ' ' < c && c < '\x7f'; }

// Bytes of the whitespace character at the start of a text, 0 for none; below, at its end.
std::size_t space_at_start(std::string_view text) {
  for (const std::string_view space : kSpaces) {
    if (text.substr(0, space.size()) == space) return space.size();
  }
  return 0;
}

std::size_t space_at_end(std::string_view text) {
  for (const std::string_view space : kSpaces) {
    if (text.size() >= space.size() && text.substr(text.size() - space.size()) == space) {
      return space.size();
    }
  }
  return 0;
}

std::string_view stripped(std::string_view text) {
  // A shortcut: a history has thousands of ids, and hardly any has whitespace around it.
  if (!text.empty() && is_visible_ascii(text.front()) && is_visible_ascii(text.back())) return text;
  while (const std::size_t size = space_at_start(text)) text.remove_prefix(size);
  while (const std::size_t size = space_at_end(text)) text.remove_suffix(size);
  return text;
}

// The digits of a whole number written as "17850.0" or "-0"; empty for other texts.
std::string digits_of(std::string_view text) {
  if (text == "-0") return "0";
  const std::size_t sign = text.substr(0, 1) == "-" ? 1 : 0;
  const std::size_t point = text.find('.');
  if (point == std::string_view::npos || point <= sign || point + 1 == text.size()) return "";
  if (text.find_first_not_of('0', point + 1) != std::string_view::npos) return "";
  for (std::size_t index = sign; index < point; ++index) {
    if (!is_digit(text[index])) return "";
  }
  if (text[sign] == '0' && point != sign + 1) return "";
  return text[sign] == '0' ? "0" : std::string(text.substr(0, point));
}

// Whether a text has the form in which Python prints floats from 1e16 on: a digit, optional digits
// after a point, an exponent of two or three digits.
bool is_large_float(std::string_view text) {
  if (text.substr(0, 1) == "-") text.remove_prefix(1);
  if (text.empty() || !is_digit(text[0]) || text[0] == '0') return false;
  text.remove_prefix(1);
  if (text.substr(0, 1) == ".") {
    const std::size_t exponent = text.find_first_not_of("0123456789", 1);
    if (exponent == 1 || exponent == std::string_view::npos) return false;
    text.remove_prefix(exponent);
  }
  if (text.substr(0, 2) != "e+" || (text.size() != 4 && text.size() != 5)) return false;
  return text.find_first_not_of("0123456789", 2) == std::string_view::npos;
}

std::string spelt(double number) {
  if (std::isinf(number)) return number < 0 ? "-inf" : "inf";
  if (number == 0) return "0";
  char text[400];  // the largest double has 309 digits
  if (number == std::floor(number)) {
    return {text, static_cast<std::size_t>(std::snprintf(text, sizeof text, "%.0f", number))};
  }
  // As Python prints it: the shortest digits that read back as the same number.
  const bool is_small = std::abs(number) < 1e-4;
  const auto form = is_small ? std::chars_format::scientific : std::chars_format::fixed;
  return {text, std::to_chars(text, text + sizeof text, number, form).ptr};
}

// SplitMix64.
uint64_t mixed(uint64_t key) {
  key += 0x9e3779b97f4a7c15u;
  key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9u;
  key = (key ^ (key >> 27)) * 0x94d049bb133111ebu;
  return key ^ (key >> 31);
}

// Whether a canonical id spells an integer of 64 bits; if so, the integer.
bool read_integer(const std::string& id, int64_t& integer) {
  const std::size_t sign = id[0] == '-' ? 1 : 0;
  if (id.size() == sign || !is_digit(id[sign])) return false;
  if (id[sign] == '0' && id.size() > 1) return false;
  const auto [end, error] = std::from_chars(id.data(), id.data() + id.size(), integer);
  return error == std::errc() && end == id.data() + id.size();
}

}  // namespace

uint64_t fnv1a(const std::string& bytes) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : bytes) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

int64_t code_of(const std::string& id) {
  int64_t integer = 0;
  const uint64_t key = read_integer(id, integer) ? static_cast<uint64_t>(integer) : fnv1a(id);
  return static_cast<int64_t>(mixed(key) >> 2);
}

int64_t hashed_row(int64_t code, int64_t num_rows, int64_t salt) {
  const uint64_t state = mixed(static_cast<uint64_t>(code) ^ static_cast<uint64_t>(salt));
  return static_cast<int64_t>(state & INT64_MAX) % num_rows;
}

std::string canonical_id(const std::string& text) {
  const std::string_view bare = stripped(text);
  if (bare == "True") return "true";
  if (bare == "False") return "false";
  if (std::string digits = digits_of(bare); !digits.empty()) return digits;
  const std::string id(bare);
  return is_large_float(bare) ? spelt(std::strtod(id.c_str(), nullptr)) : id;
}

std::string canonical_id(const Json& value) {
  if (value.is_string()) return canonical_id(value.get_ref<const std::string&>());
  if (value.is_boolean()) return value.get<bool>() ? "true" : "false";
  if (value.is_number_float()) return spelt(value.get<double>());
  return value.is_number_integer() ? value.dump() : long_integer(value);
}
