// An exported program behind plain types: it is loaded, checked and asked one request at a time.

#pragma once

#include "requests.h"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

// The artifact cannot be served: a file of it is missing, broken or another artifact's.
struct ArtifactError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A request has no scores: the model gave some that are not finite. The message names candidates.
struct ScoreError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct CacheLimits {
  int64_t capacity_bytes = 256 << 20;
  double ttl_s = 300;
};

// What the program's cache did for one answer; as CacheUse of torchrec_kvshare/scoring/engine.py.
struct CacheUse {
  std::string status, reason;
  int64_t cached_events, computed_events;
};

struct Scored {
  std::vector<double> scores;
  CacheUse cache;
  double model_ms = 0;  // in the program's call alone
};

class Host {
 public:
  // Loads the artifact and warms it up with its golden requests, whose scores it must give. Without
  // limits nothing is cached. Throws ArtifactError.
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
