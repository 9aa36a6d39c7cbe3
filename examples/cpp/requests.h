// Parses requests to columns of table rows, and checks outside input; no other file checks it.
//
// torchrec_kvshare/features/parse.py defines the result: the same rows, windows and dense features
// to the bit, and the same errors. torchrec_kvshare/features/tensors.py defines the columns' names.

#pragma once

#include "strict_json.h"

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

struct RequestError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Rows of an embedding table by canonical id: those of a vocabulary, or of a hash.
class IdMap {
 public:
  // The codes of known ids in ascending order, and the row of each.
  IdMap(std::vector<int64_t> codes, std::vector<int64_t> rows);

  // Hashed ids; the reserved rows come on top of num_rows.
  IdMap(int64_t num_rows, int64_t salt);

  int64_t row(const std::string& id) const;

 private:
  std::vector<int64_t> codes_, rows_;
  int64_t num_hashed_rows_ = 0;  // 0: a vocabulary
  int64_t salt_ = 0;
};

// The last events of a history, starting on a block boundary.
struct Window {
  int64_t max_history;
  int64_t block;

  // Index of the first event that the model reads of a history of num_events.
  int64_t start(int64_t num_events) const;

  // The same if a request gives only the last num_given events, from index first_event on.
  int64_t start_among(int64_t first_event, int64_t num_given) const;
};

// One history of a user: the events with these canonical actions, or all events if there are none.
struct History {
  std::string name;
  Window window;
  std::set<std::string> actions;
};

// The columns that a model reads, and the rows of their ids.
struct Schema {
  std::unordered_map<std::string, IdMap> vocabulary_by_column;
  std::vector<std::string> context, context_floats;
  std::vector<std::string> event_columns, event_floats;
  std::vector<std::string> item_attributes;
  std::vector<std::string> item_floats;
  std::vector<History> histories;

  // Number of dense features of a candidate.
  int64_t num_dense() const;

  // From schema.json, and the numbers of ids.npy beside it.
  static Schema from_json(const Json& values, const std::vector<int64_t>& ids);
};

// Number of ids in one column, and of those that its vocabulary does not have.
struct IdCount {
  int64_t given = 0, unknown = 0;
};

// A request that passed its checks.
struct Request {
  std::string request_id;                               // as JSON
  std::map<std::string, std::vector<int64_t>> columns;  // of integers, by name
  std::map<std::string, std::vector<float>> floats;     // by name, those of events
  std::vector<float> dense;                             // [num_candidates, num_dense]
  int64_t num_candidates = 0;
  int64_t num_events = 0;  // of all histories, that the model reads
  std::map<std::string, IdCount> ids;  // by the request's column name; of the events that are read
  bool reports_unknown_ids = false;    // whether the answer has their numbers
};

// Throws RequestError if the line is no JSON object.
Json decode_request(const std::string& line);

// The request's id as JSON; null if it has none, or one that may not be sent back.
std::string request_id_of(const Json& raw);

// Throws RequestError that names the column, what came and what was allowed.
Request parse_request(const Json& raw, const Schema& schema);
