#pragma once

#include "attention_work.h"

#include <vector>

/// Which chunks of which sequences are the same pages.
namespace pagedkv {

/// Chunks [chunk_first, chunk_last) that all of `tiles` see and whose pages they share; of the last chunk the first
/// `shared_tokens` tokens.
struct SharedChunks {
  std::vector<int32_t> tiles;
  int64_t chunk_first, chunk_last, shared_tokens;
};

/// Groups tiles by the leading pages they have in common, several levels deep, so that the fewest keys are read. No chunk of a
/// tile is named twice, and those named of one tile follow each other.
std::vector<SharedChunks> find_shared_chunks(const AttentionBatch& batch, const std::vector<AttentionTile>& tiles);

}  // namespace pagedkv
