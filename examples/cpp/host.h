// Load and check an exported program, and score one request at a time; no torch types.

#pragma once

#include "requests.h"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// The artifact cannot be served: one of its files is missing, broken or of another artifact.
struct ArtifactError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The model gave scores that are not finite. The message names the candidates.
struct ScoreError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct CacheLimits {
  int64_t capacity_bytes = 256 << 20;
  double ttl_s = 300;
};

// What the program's cache did for one answer, as CacheUse in Python.
struct CacheUse {
  std::string status, reason;
  int64_t cached_events, computed_events;
};

// Probabilities of all candidates, by task; the name of an unnamed task is empty.
using Scores = std::vector<std::pair<std::string, std::vector<double>>>;

struct Scored {
  Scores scores;
  CacheUse cache;
  double model_ms = 0;  // of the program's call only
};

class Host {
 public:
  // Loads the artifact and warms it up with its golden requests, which must get their golden
  // scores. Without limits nothing is cached. Throws ArtifactError.
  Host(const std::filesystem::path& artifact, const std::optional<CacheLimits>& limits);
  ~Host();

  // Calls must not overlap. Throws ScoreError.
  Scored rank(const Request& request);

  const Schema& schema() const { return schema_; }
  const std::string& model_version() const { return model_version_; }

 private:
  struct Program;

  bool is_cached_;
  Schema schema_;
  std::string model_version_;
  std::unique_ptr<Program> program_;

  void check_golden(const Json& golden);
};

void set_num_threads(int num_threads);
