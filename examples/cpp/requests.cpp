#include "requests.h"

#include "ids.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <utility>

namespace {

constexpr int64_t kMissingRow = 0;  // no value in this column
constexpr int64_t kUnknownRow = 1;  // a value never seen in training
constexpr int64_t kNumReservedRows = 2;

constexpr double kMaxTime = 4102444800;  // 2100-01-01; later numbers are milliseconds
constexpr double kMaxNumber = 1e30;
constexpr std::size_t kMaxCandidates = 100'000;
constexpr int64_t kMaxFirstEvent = int64_t{1} << 62;
constexpr std::size_t kMaxIdCharacters = 256;  // of a canonical id
constexpr std::size_t kMaxRequestId = 200;     // characters
constexpr std::size_t kMaxShown = 200;  // bytes of a value or of a list of names in a message

constexpr int64_t kSecondsPerHour = 3600;
constexpr int64_t kSecondsPerDay = 24 * kSecondsPerHour;
constexpr int64_t kNumClockFeatures = 4;
constexpr int64_t kEpochWeekday = 3;  // 1970-01-01 was a Thursday; Monday is 0.

const std::string kUser = "user_id", kItem = "item_id", kAction = "action", kTime = "time";
const std::string kFirstEvent = "first_event", kUnknownIds = "unknown_ids";

using Names = std::vector<std::string>;
using Columns = std::map<std::string, const Json*>;  // arrays of one length by name
using Cells = std::vector<const Json*>;              // some rows of a column

// Ids of several rows, one after the other, and the length of each row.
struct Bags {
  std::vector<int64_t> values, lengths;
};

std::string cut(const std::string& text) {
  return text.size() <= kMaxShown ? text : text.substr(0, kMaxShown) + "...";
}

// A value for a message: short, whatever its size and depth.
std::string shown(const Json& value) {
  if (value.is_array()) return "a list of " + std::to_string(value.size());
  if (value.is_object()) return "an object of " + std::to_string(value.size());
  if (value.is_string()) return "'" + cut(value.get_ref<const std::string&>()) + "'";
  return value.is_binary() ? cut(long_integer(value)) : value.dump();
}

std::string keys_of(const Json& object) {
  std::string keys;
  for (const auto& item : object.items()) keys += (keys.empty() ? "'" : ", '") + item.key() + "'";
  return "[" + cut(keys) + "]";
}

Names joined(Names names, const Names& more) {
  names.insert(names.end(), more.begin(), more.end());
  return names;
}

const Json& need(const Json& group, const std::string& name, const std::string& where) {
  const auto found = group.find(name);
  if (found == group.end()) {
    throw RequestError(where + " has no '" + name + "'; it has " + keys_of(group));
  }
  return *found;
}

const Json& need_group(const Json& raw, const std::string& name, const Names& columns) {
  const Json& group = need(raw, name, "the request");
  if (!group.is_object()) {
    throw RequestError(name + " is an object of columns; got " + group.type_name());
  }
  for (const std::string& column : columns) need(group, column, name);
  return group;
}

// The needed columns of a group: lists of one length.
Columns need_columns(const Json& raw, const std::string& name, const Names& columns) {
  const Json& group = need_group(raw, name, columns);
  Columns found;
  std::string lengths;
  bool differ = false;
  for (const std::string& column : columns) {
    const Json& cells = group.at(column);
    if (!cells.is_array()) {
      throw RequestError(name + "." + column + " is a list, one value a row; got " +
                         cells.type_name());
    }
    found[column] = &cells;
    differ |= cells.size() != group.at(columns[0]).size();
    lengths += (lengths.empty() ? "'" : ", '") + column + "': " + std::to_string(cells.size());
  }
  if (differ) {
    throw RequestError("the columns of " + name + " differ in length: {" + lengths + "}");
  }
  return found;
}

// Characters of a UTF-8 text: all its bytes except continuation bytes.
std::size_t num_characters(const std::string& text) {
  std::size_t count = 0;
  for (const char byte : text) count += (static_cast<unsigned char>(byte) & 0xc0) != 0x80;
  return count;
}

void check_length(const std::string& text, const std::string& name, std::size_t most) {
  if (text.size() <= most) return;
  const std::size_t length = num_characters(text);
  if (length > most) {
    throw RequestError(name + " has " + std::to_string(length) + " characters; at most " +
                       std::to_string(most) + " are allowed");
  }
}

std::string id_of(const Json& value, const std::string& column) {
  std::string id = canonical_id(value);
  check_length(id, column, kMaxIdCharacters);
  if (id.empty()) {
    throw RequestError(column + " holds " + shown(value) +
                       "; an id is a text that is not blank, an integer, a finite number or a "
                       "boolean");
  }
  return id;
}

double number_of(const Json& value, const std::string& column) {
  double number = NAN;
  if (value.is_number()) number = value.get<double>();
  if (value.is_binary()) number = std::stod(long_integer(value));
  if (!(std::abs(number) <= kMaxNumber)) {
    throw RequestError(column + " holds " + shown(value) + "; a finite number is allowed");
  }
  return number;
}

int64_t time_of(const Json& value, const std::string& column) {
  const double time = number_of(value, column);
  if (!(0 <= time && time <= kMaxTime)) {
    throw RequestError(column + " is " + shown(value) +
                       "; Unix seconds from 0 to 4102444800 are allowed");
  }
  return static_cast<int64_t>(time);
}

// The program also compares events: users with equal keys lose reuse, not scores.
int64_t user_key(const std::string& id) { return static_cast<int64_t>(fnv1a(id)); }

// The text or the digits of a request's id; empty for other values.
std::string request_id_text(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  return value.is_number_integer() ? value.dump() : long_integer(value);
}

int64_t row_of(const Json& value, const IdMap& vocabulary, const std::string& column) {
  return value.is_null() ? kMissingRow : vocabulary.row(id_of(value, column));
}

std::vector<int64_t> rows_of(const Cells& cells, const IdMap& vocabulary,
                             const std::string& column) {
  std::vector<int64_t> rows;
  rows.reserve(cells.size());
  for (const Json* cell : cells) rows.push_back(row_of(*cell, vocabulary, column));
  return rows;
}

// Rows of multi-valued cells; a single id is a list of one, null an empty list.
Bags bags_of(const Cells& cells, const IdMap& vocabulary, const std::string& column) {
  Bags bags;
  for (const Json* cell : cells) {
    const std::size_t start = bags.values.size();
    if (cell->is_array()) {
      for (const Json& value : *cell) bags.values.push_back(row_of(value, vocabulary, column));
    } else if (!cell->is_null()) {
      bags.values.push_back(row_of(*cell, vocabulary, column));
    }
    bags.lengths.push_back(static_cast<int64_t>(bags.values.size() - start));
  }
  return bags;
}

// One bag with all values, those of one request.
Bags of_one_request(std::vector<int64_t> values) {
  const auto length = static_cast<int64_t>(values.size());
  return {std::move(values), {length}};
}

// Adds the ids of one column to the request's counts.
void count(Request& request, const std::string& column, const std::vector<int64_t>& rows) {
  IdCount& ids = request.ids[column];
  for (const int64_t row : rows) {
    ids.given += row != kMissingRow;
    ids.unknown += row == kUnknownRow;
  }
}

void put(Request& request, const std::string& key, Bags bags) {
  request.columns[key + ".values"] = std::move(bags.values);
  request.columns[key + ".lengths"] = std::move(bags.lengths);
}

// Adds ids; their column in the request has another name than their key among the model's inputs.
void put_ids(Request& request, const std::string& key, const std::string& column, Bags bags) {
  count(request, column, bags.values);
  put(request, key, std::move(bags));
}

Cells all_of(const Json& column) {
  Cells cells;
  cells.reserve(column.size());
  for (const Json& cell : column) cells.push_back(&cell);
  return cells;
}

// All events of a request.
struct Events {
  Columns columns;
  std::vector<int64_t> times;
  int64_t first_event;  // index of the first of them among all of the user's
};

// Times of all events, checked as in training: oldest first, and before the request.
std::vector<int64_t> times_of(const Json& column, int64_t request_time) {
  const std::string name = "history." + kTime;
  const auto event = [&](std::size_t index, int64_t time) {
    return name + "[" + std::to_string(index) + "] is " + std::to_string(time);
  };
  std::vector<int64_t> times;
  times.reserve(column.size());
  for (const Json& cell : column) times.push_back(time_of(cell, name));
  for (std::size_t index = 0; index < times.size(); ++index) {
    if (times[index] >= request_time) {
      throw RequestError(event(index, times[index]) + ", not before the request's time " +
                         std::to_string(request_time));
    }
    if (index > 0 && times[index] < times[index - 1]) {
      throw RequestError(event(index, times[index]) + ", before " + name + "[" +
                         std::to_string(index - 1) + "] = " + std::to_string(times[index - 1]) +
                         ": events are given oldest first");
    }
  }
  return times;
}

// Index of the request's first event; 0 if the request does not say.
int64_t first_event_of(const Json& group, const Schema& schema) {
  const auto given = group.find(kFirstEvent);
  if (given == group.end() || given->is_null()) return 0;
  const bool is_right = given->is_number_integer() && *given >= 0 && *given <= kMaxFirstEvent;
  const std::string name = "history." + kFirstEvent + " is " + shown(*given);
  if (!is_right) {
    throw RequestError(name + "; an integer from 0 to " + std::to_string(kMaxFirstEvent) +
                       " is allowed: how many of the user's events are older than those given");
  }
  std::string of_actions;
  for (const History& history : schema.histories) {
    if (history.actions.empty()) continue;
    of_actions += (of_actions.empty() ? "'" : ", '") + history.name + "'";
  }
  if (*given > 0 && !of_actions.empty()) {
    throw RequestError(name + "; the model's histories [" + of_actions +
                       "] keep some actions only, so how many of their events came before is "
                       "unknown: send all events");
  }
  return given->get<int64_t>();
}

bool reports_unknown_ids(const Json& raw) {
  const auto given = raw.find("report");
  if (given == raw.end() || given->is_null()) return false;
  bool is_right = given->is_array();
  if (is_right) {
    for (const Json& one : *given) is_right &= one == kUnknownIds;
  }
  if (!is_right) {
    throw RequestError("report is " + shown(*given) + "; a list of ['" + kUnknownIds +
                       "'] is allowed");
  }
  return !given->empty();
}

// Indices of a history's events among those given.
std::vector<std::size_t> indices_of(const History& history, const Events& events) {
  std::vector<std::size_t> indices;
  for (std::size_t index = 0; index < events.times.size(); ++index) {
    if (!history.actions.empty()) {
      const Json& action = (*events.columns.at(kAction))[index];
      if (action.is_null() || !history.actions.count(id_of(action, "history." + kAction))) continue;
    }
    indices.push_back(index);
  }
  return indices;
}

// The key of an event column's vocabulary: the item's own, or the attribute's.
std::string event_key(const std::string& column) {
  return column == kItem ? column : "events." + column;
}

// Signed logarithm: it brings prices and counts of any scale near one for the dense arch.
float squash(double value) {
  const int sign = (value > 0) - (value < 0);
  return static_cast<float>(sign * std::log1p(std::abs(value)));
}

// One history of a request, cut to the window.
void put_history(Request& request, const History& history, const Events& events,
                 const Schema& schema) {
  std::vector<std::size_t> indices = indices_of(history, events);
  const int64_t first_event =
      history.window.start_among(events.first_event, static_cast<int64_t>(indices.size()));
  indices.erase(indices.begin(), indices.begin() + (first_event - events.first_event));
  const auto cells = [&](const std::string& column) {
    Cells read;
    for (const std::size_t index : indices) read.push_back(&(*events.columns.at(column))[index]);
    return read;
  };
  for (const std::string& column : schema.event_columns) {
    const IdMap& vocabulary = schema.vocabulary_by_column.at(event_key(column));
    const std::string name = "history." + column;
    put_ids(request, history.name + "." + column, name,
            of_one_request(rows_of(cells(column), vocabulary, name)));
  }
  for (const std::string& column : schema.event_floats) {
    std::vector<float> floats;
    for (const Json* cell : cells(column)) {
      floats.push_back(squash(number_of(*cell, "history." + column)));
    }
    const std::string key = history.name + "." + column;
    request.columns[key + ".lengths"] = {static_cast<int64_t>(floats.size())};
    request.floats[key + ".values"] = std::move(floats);
  }
  std::vector<int64_t> times;
  for (const std::size_t index : indices) times.push_back(events.times[index]);
  request.num_events += static_cast<int64_t>(times.size());
  put(request, history.name + "." + kTime, of_one_request(std::move(times)));
  for (const std::string& column : schema.item_attributes) {
    const IdMap& vocabulary = schema.vocabulary_by_column.at("items." + column);
    const std::string name = "history." + column;
    put_ids(request, history.name + "." + column, name, bags_of(cells(column), vocabulary, name));
  }
  request.columns[history.name + "." + kFirstEvent] = {first_event};
}

void put_candidates(Request& request, const Columns& columns, const Schema& schema) {
  const IdMap& items = schema.vocabulary_by_column.at(kItem);
  const std::string item = "candidates." + kItem;
  put_ids(request, item, item, of_one_request(rows_of(all_of(*columns.at(kItem)), items, item)));
  for (const std::string& column : schema.item_attributes) {
    const IdMap& vocabulary = schema.vocabulary_by_column.at("items." + column);
    const std::string name = "candidates." + column;
    put_ids(request, name, name, bags_of(all_of(*columns.at(column)), vocabulary, name));
  }
}

// Hour of day and day of week, UTC, as points on two circles.
std::vector<float> clock_features(int64_t time) {
  const double hour = static_cast<double>(time % kSecondsPerDay) * (2 * M_PI / kSecondsPerDay);
  const int64_t day = time / kSecondsPerDay + kEpochWeekday;
  const double weekday = static_cast<double>(day % 7) * (2 * M_PI / 7);
  return {static_cast<float>(std::sin(hour)), static_cast<float>(std::cos(hour)),
          static_cast<float>(std::sin(weekday)), static_cast<float>(std::cos(weekday))};
}

// By candidate: the clock features and the floats of the request, then the floats of the item.
std::vector<float> dense_of(const Json& raw, const Columns& candidates, const Schema& schema,
                            int64_t time) {
  std::vector<float> of_request = clock_features(time);
  for (const std::string& column : schema.context_floats) {
    of_request.push_back(squash(number_of(raw.at("context").at(column), "context." + column)));
  }
  std::vector<float> dense;
  for (std::size_t row = 0; row < candidates.at(kItem)->size(); ++row) {
    dense.insert(dense.end(), of_request.begin(), of_request.end());
    for (const std::string& column : schema.item_floats) {
      const Json& value = (*candidates.at(column))[row];
      dense.push_back(squash(number_of(value, "candidates." + column)));
    }
  }
  return dense;
}

// One column's map. The file has two rows of numbers, of all vocabularies: codes, then table rows.
IdMap id_map_of(const Json& values, const std::vector<int64_t>& ids) {
  const std::string kind = values.at("kind").get<std::string>();
  if (kind == "hashed") {
    return {values.at("num_rows").get<int64_t>(), values.at("salt").get<int64_t>()};
  }
  if (kind != "vocabulary") throw JsonError("ids are '" + kind + "'; vocabulary or hashed");
  const std::size_t num_all = ids.size() / 2;
  const auto first = values.at("first_id").get<std::size_t>();
  const auto num_ids = values.at("num_ids").get<std::size_t>();
  if (first > num_all || num_ids > num_all - first) {
    throw JsonError("a vocabulary has " + std::to_string(num_ids) + " ids from " +
                    std::to_string(first) + " on; ids.npy has " + std::to_string(num_all));
  }
  const auto codes = ids.begin() + static_cast<std::ptrdiff_t>(first);
  const auto rows = codes + static_cast<std::ptrdiff_t>(num_all);
  const auto size = static_cast<std::ptrdiff_t>(num_ids);
  return {std::vector<int64_t>(codes, codes + size), std::vector<int64_t>(rows, rows + size)};
}

}  // namespace

IdMap::IdMap(std::vector<int64_t> codes, std::vector<int64_t> rows)
    : codes_(std::move(codes)), rows_(std::move(rows)) {}

IdMap::IdMap(int64_t num_rows, int64_t salt) : num_hashed_rows_(num_rows), salt_(salt) {
  if (num_rows < 1) throw JsonError("num_rows is " + std::to_string(num_rows) + "; at least 1");
}

int64_t IdMap::row(const std::string& id) const {
  const int64_t code = code_of(id);
  if (num_hashed_rows_) return kNumReservedRows + hashed_row(code, num_hashed_rows_, salt_);
  const auto found = std::lower_bound(codes_.begin(), codes_.end(), code);
  return found == codes_.end() || *found != code ? kUnknownRow : rows_[found - codes_.begin()];
}

int64_t Window::start(int64_t num_events) const {
  if (num_events <= max_history) return 0;
  // The excess over max_history, rounded up to whole blocks.
  return (num_events - max_history + block - 1) / block * block;
}

int64_t Window::start_among(int64_t first_event, int64_t num_given) const {
  const int64_t end = first_event + num_given;
  if (start(end) >= first_event) return start(end);
  // The first complete block: the window stays there while events are appended.
  const int64_t boundary = (first_event + block - 1) / block * block;
  return boundary < end ? boundary : first_event;
}

int64_t Schema::num_dense() const {
  return kNumClockFeatures + static_cast<int64_t>(context_floats.size() + item_floats.size());
}

Schema Schema::from_json(const Json& values, const std::vector<int64_t>& ids) {
  Schema schema;
  for (const auto& item : values.at("vocabulary_by_column").items()) {
    schema.vocabulary_by_column.emplace(item.key(), id_map_of(item.value(), ids));
  }
  schema.context = values.at("context").get<Names>();
  schema.context_floats = values.at("context_floats").get<Names>();
  schema.event_columns = joined({kItem}, values.at("event_attributes").get<Names>());
  schema.event_floats = values.at("event_floats").get<Names>();
  schema.item_attributes = values.at("item_attributes").get<Names>();
  schema.item_floats = values.at("item_floats").get<Names>();
  for (const Json& history : values.at("histories")) {
    const Json& window = history.at("window");
    const Window read{window.at("max_history").get<int64_t>(), window.at("block").get<int64_t>()};
    if (read.block < 1) throw JsonError("block is " + window.at("block").dump() + "; at least 1");
    std::set<std::string> actions;
    for (const std::string& action : history.at("actions").get<Names>()) {
      actions.insert(canonical_id(action));
    }
    schema.histories.push_back({history.at("name").get<std::string>(), read, actions});
  }
  return schema;
}

Json decode_request(const std::string& line) {
  Json raw;
  try {
    raw = read_json(line);
  } catch (const JsonError& error) {
    throw RequestError(cut(error.what()));
  }
  if (!raw.is_object()) {
    throw RequestError(std::string("a request is a JSON object; got ") + raw.type_name());
  }
  return raw;
}

std::string request_id_of(const Json& raw) {
  const auto found = raw.find("request_id");
  if (found == raw.end()) return "null";
  const std::string id = request_id_text(*found);
  if (id.empty() && !found->is_string()) return "null";
  if (num_characters(id) > kMaxRequestId) return "null";
  return found->is_string() ? json_string(id) : id;
}

Request parse_request(const Json& raw, const Schema& schema) {
  Request request;
  const int64_t time = time_of(need(raw, kTime, "the request"), kTime);
  const std::string user_id = id_of(need(raw, kUser, "the request"), kUser);
  const Names context = joined(schema.context, schema.context_floats);
  if (!context.empty()) need_group(raw, "context", context);
  Events events;
  const Names of_events = joined(schema.event_columns, schema.event_floats);
  events.columns = need_columns(
      raw, "history", joined(joined(of_events, schema.item_attributes), {kTime}));
  events.times = times_of(*events.columns.at(kTime), time);
  events.first_event = first_event_of(raw["history"], schema);
  const Columns candidates = need_columns(
      raw, "candidates", joined(joined({kItem}, schema.item_attributes), schema.item_floats));
  const std::size_t num_candidates = candidates.at(kItem)->size();
  if (num_candidates > kMaxCandidates) {
    throw RequestError("candidates has " + std::to_string(num_candidates) + " rows; at most " +
                       std::to_string(kMaxCandidates) + " are allowed");
  }
  request.num_candidates = static_cast<int64_t>(num_candidates);
  const auto given_id = raw.find("request_id");
  if (given_id != raw.end()) check_length(request_id_text(*given_id), "request_id", kMaxRequestId);
  request.request_id = request_id_of(raw);
  if (request.request_id == "null" && raw.contains("request_id") && !raw["request_id"].is_null()) {
    throw RequestError("request_id is text or an integer; got " + shown(raw["request_id"]));
  }
  request.reports_unknown_ids = reports_unknown_ids(raw);
  const int64_t user_row = schema.vocabulary_by_column.at(kUser).row(user_id);
  count(request, kUser, {user_row});
  request.columns = {
      {"user_key", {user_key(user_id)}},
      {kUser, {user_row}},
      {kTime, {time}},
  };
  for (const std::string& column : schema.context) {
    const std::string name = "context." + column;
    const IdMap& vocabulary = schema.vocabulary_by_column.at(name);
    put_ids(request, name, name, bags_of({&raw["context"][column]}, vocabulary, name));
  }
  for (const History& one : schema.histories) put_history(request, one, events, schema);
  put_candidates(request, candidates, schema);
  request.dense = dense_of(raw, candidates, schema, time);
  return request;
}
