#include "strict_json.h"

#include <nlohmann/json.hpp>

#include <utility>
#include <vector>

namespace {

// The limits of torchrec_kvshare/features/decode.py.
constexpr std::size_t kMaxDepth = 16;
constexpr std::size_t kMaxKeys = 4096;

// Builds the value from the parser's events.
class Builder : public nlohmann::json_sax<Json> {
 public:
  Json root;

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t value) override { return add(value); }
  bool number_unsigned(number_unsigned_t value) override { return add(value); }
  bool number_float(number_float_t value, const string_t& text) override {
    // The parser gives integers beyond 64 bits as floats. JSON has no binary values, so a binary
    // value can hold their digits.
    if (text.find_first_of(".eE") != std::string::npos) return add(value);
    return add(Json::binary({text.begin(), text.end()}));
  }
  bool string(string_t& value) override { return add(std::move(value)); }
  bool binary(binary_t&) override { return false; }

  bool start_object(std::size_t) override { return open(Json::object()); }
  bool key(string_t& name) override {
    if (open_.back()->size() == kMaxKeys) {
      throw JsonError("an object has more than " + std::to_string(kMaxKeys) + " keys");
    }
    const auto [entry, is_new] = open_.back()->emplace(name, nullptr);
    if (!is_new) throw JsonError("the key '" + name + "' appears twice in one object");
    of_key_ = &*entry;
    return true;
  }
  bool end_object() override { return close(); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_array() override { return close(); }

  bool parse_error(std::size_t, const std::string&, const Json::exception& error) override {
    throw JsonError("the text is not JSON: " + std::string(error.what()));
  }

 private:
  // Objects and arrays that are still open. None of them moves while one inside it is open.
  std::vector<Json*> open_;
  Json* of_key_ = nullptr;

  Json* put(Json value) {
    if (open_.empty()) return &(root = std::move(value));
    if (open_.back()->is_object()) return &(*of_key_ = std::move(value));
    return &open_.back()->emplace_back(std::move(value));
  }

  bool add(Json value) { return put(std::move(value)) != nullptr; }

  bool open(Json value) {
    if (open_.size() == kMaxDepth) {
      throw JsonError("the JSON is nested more than " + std::to_string(kMaxDepth) + " deep");
    }
    open_.push_back(put(std::move(value)));
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }
};

}  // namespace

Json read_json(const std::string& text) {
  // The library takes a zero byte for the end of the text.
  if (text.find('\0') != std::string::npos) throw JsonError("the text has a zero byte");
  Builder builder;
  Json::sax_parse(text, &builder);
  return std::move(builder.root);
}

std::string long_integer(const Json& value) {
  if (!value.is_binary()) return "";
  const auto& digits = value.get_binary();
  return {digits.begin(), digits.end()};
}

std::string json_string(const std::string& text) {
  return Json(text).dump(-1, ' ', true, Json::error_handler_t::replace);
}
