// Requests in, columns of table rows out; the one place where outside input is checked.
//
// torchrec_kvshare/features/parse.py is the meaning: the same rows, windows and dense features to the
// bit, and the same refusals. Columns have the names that torchrec_kvshare/features/tensors.py gives them.

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

// Rows of an embedding table by id, spelt as canonical_id does.
class Vocabulary {
 public:
  explicit Vocabulary(const std::vector<std::string>& ids);
  int64_t row(const std::string& id) const;

 private:
  std::unordered_map<std::string, int64_t> row_by_id_;
};

// The last events of a history, from a block boundary on.
struct Window {
  int64_t max_history;
  int64_t block;

  // First event that the model reads of a history of so many.
  int64_t start(int64_t num_events) const;

  // Likewise, of a history of which the last events alone are given, from one place on.
  int64_t start_among(int64_t first_event, int64_t num_given) const;
};

// One history of a user; of all events, if it names no actions, spelt as canonical_id does.
struct History {
  std::string name;
  Window window;
  std::set<std::string> actions;
};

// The columns that a model reads and the vocabulary of each.
struct Schema {
  std::unordered_map<std::string, Vocabulary> vocabulary_by_column;
  std::vector<std::string> context;
  std::vector<std::string> event_columns;
  std::vector<std::string> item_attributes;
  std::vector<std::string> item_floats;
  std::vector<History> histories;

  // Dense features of a candidate.
  int64_t num_dense() const;

  // As FeatureSchema.to_json wrote it.
  static Schema from_json(const Json& values);
};

// Ids of one column that were given, and those of them that no table knows.
struct IdCount {
  int64_t given = 0, unknown = 0;
};

// A request that passed its checks.
struct Request {
  std::string request_id;                               // as JSON
  std::map<std::string, std::vector<int64_t>> columns;  // by name, but for candidates.dense
  std::vector<float> dense;                             // [num_candidates, num_dense]
  int64_t num_candidates = 0;
  int64_t num_events = 0;  // that the model reads, of all histories
  std::map<std::string, IdCount> ids;  // by column, named as in the request; of events those read
  bool reports_unknown_ids = false;    // whether the answer is to tell their number
};

// Throws RequestError if the line is no JSON object.
Json decode_request(const std::string& line);

// The id as JSON again; null if it has none, or none that may be sent back.
std::string request_id_of(const Json& raw);

// Throws RequestError, naming the column, what came and what was allowed.
Request parse_request(const Json& raw, const Schema& schema);
