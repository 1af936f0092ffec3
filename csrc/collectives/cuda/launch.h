/* C face of the CUDA collectives, so that the .cu files see no torch header and the bindings no
 * CUDA header.
 *
 * Each rank owns a segment of device memory that all ranks of the group have mapped. A collective
 * is one kernel on the caller's stream, without any wait of the host; all ranks launch the same
 * one, in the same order, on one stream or on streams that wait for each other. It may be captured
 * in a CUDA graph: what changes from call to call lies in the segments. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "transport/device_memory.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
  PRIMITIVES_CUDA_MAX_RANKS = 8,
  PRIMITIVES_CUDA_MAX_BLOCKS = 64,
  PRIMITIVES_CUDA_LETTER_WORDS = 6,
  PRIMITIVES_CUDA_MAX_CHUNKS = 16, /* of a rank's symmetric memory */
  /* A place there: the chunk, from this bit on, and the offset in it. */
  PRIMITIVES_CUDA_CHUNK_SHIFT = 40,
  /* A multiple of this is a good slot: it can be shared by any number of ranks. */
  PRIMITIVES_CUDA_SLOT_GRAIN = 2 * 16 * PRIMITIVES_CUDA_MAX_RANKS,
  /* Sizes to begin with; not measured yet. */
  PRIMITIVES_CUDA_SLOT_NBYTES = 64 << 10,
  PRIMITIVES_CUDA_BLOCK_NBYTES = 16 << 10,
  PRIMITIVES_CUDA_ONE_SHOT_NBYTES = 256 << 10,
  PRIMITIVES_CUDA_DIRECT_NBYTES = 32 << 10,
};
#define PRIMITIVES_CUDA_NOT_SYMMETRIC UINT64_MAX

enum primitives_cuda_failure {
  PRIMITIVES_CUDA_TIMEOUT = 1,
  PRIMITIVES_CUDA_MISMATCH = 2,
  PRIMITIVES_CUDA_TOLD = 3,    /* a peer has failed, and says why */
  PRIMITIVES_CUDA_ABORTED = 4, /* by this rank's host */
};

/* Pinned host memory of one rank: why a kernel of this rank gave up. All zero at first. */
typedef struct {
  uint32_t state; /* 0: no failure; 1: it is being written; 2: it is there */
  uint32_t abort; /* the host writes 1: kernels that wait give up */
  uint32_t failure;
  int32_t rank;     /* who found it: this one, or the peer that told it */
  uint32_t missing; /* timeout: one bit per rank that did not come */
  int32_t peer;     /* mismatch: with whom */
  uint32_t op, seq; /* of the call of `rank` */
  uint32_t block;
  uint32_t epoch; /* timeout: the meeting, a number that all ranks count alike for each block */
  uint64_t mine[PRIMITIVES_CUDA_LETTER_WORDS], theirs[PRIMITIVES_CUDA_LETTER_WORDS];
  uint32_t uploaded;   /* seq of the last fused call whose table is on the device (no failure) */
  uint32_t num_direct; /* calls that read symmetric memory in place (no failure) */
} primitives_cuda_status;

/* A group, as one rank sees it. The sizes are equal on all ranks. */
typedef struct {
  int32_t rank, world_size;
  int32_t max_blocks;       /* of a kernel */
  uint32_t slot_nbytes;     /* of staging, two for each block; a multiple of the grain */
  uint32_t block_nbytes;    /* a kernel has a block for each of these */
  uint32_t one_shot_nbytes; /* up to here every rank of an all_reduce sums everything */
  uint32_t direct_nbytes;   /* from here on symmetric memory is read in place */
  char* segments[PRIMITIVES_CUDA_MAX_RANKS]; /* as mapped here */
  /* Symmetric memory, as mapped here, or null. */
  char* chunks[PRIMITIVES_CUDA_MAX_RANKS][PRIMITIVES_CUDA_MAX_CHUNKS];
  primitives_cuda_status* status; /* as the device sees it */
  uint64_t timeout_ns;
} primitives_cuda_ranks;

/* The tensors of a fused collective. The words of `table` are those of table.hpp. */
typedef struct {
  uint64_t* table;    /* on the device; null: the call is not fused */
  const void* upload; /* pinned memory that is copied there before the kernel starts, or null */
  uint64_t upload_nbytes;
  uint64_t digest; /* of how the tensors are cut; the same on all ranks */
  uint32_t num_tensors;
  uint8_t from, to; /* all_gather: DTypes of shards and full tensors; equal: copied as they are */
  uint8_t in_itemsize, out_itemsize; /* reduce_scatter: out is float32 */
  uint8_t accumulate;                /* reduce_scatter */
  float* squares;  /* reduce_scatter: a sum for each shard of this rank, or null */
  float* partials; /* room for squares, see table.hpp */
} primitives_cuda_many;

/* One collective of one rank. Unused parts are null and 0; in[r] is meant for rank r, out[r] is
 * from it.
 *   all_gather      in[every r]: the shard; out[r]: that of rank r. May differ in size.
 *   all_to_all      in[r], out[r]. May differ in size; may not overlap.
 *   reduce_scatter  in[r]: all of one size; out[0], may be in[rank].
 *   all_reduce      in[0], out[0]: the same, or apart
 *   broadcast       in[0], out[0]: the same, or apart
 *   reduce          in[0]; out[0]: written on the root only; the same, or apart
 *   gather          in[root] of every rank; out[every r] on the root      \ with has_counts, and
 *   scatter         in[every r] on the root; out[root] of every rank      / nothing else
 *   barrier         nothing
 *   fused           in_nbytes[r]: the stream of rank r, as it is staged; `many` */
typedef struct {
  uint8_t op, dtype, reduce_op; /* primitives::Op, DType, ReduceOp */
  uint8_t has_counts;           /* sizes may differ between ranks */
  int32_t root;                 /* -1: none */
  uint32_t seq;                 /* of the call, for messages */
  int32_t num_blocks;           /* set by primitives_cuda_launch */
  double factor;                /* premul_sum, fused reduce_scatter */
  uint64_t place;               /* of in[0], when all parts lie in a chunk that all ranks have
                                 * mapped, or PRIMITIVES_CUDA_NOT_SYMMETRIC; fused: 0, when all
                                 * tensors lie in such chunks and the table has their places */
  const char* in[PRIMITIVES_CUDA_MAX_RANKS];
  uint64_t in_nbytes[PRIMITIVES_CUDA_MAX_RANKS];
  char* out[PRIMITIVES_CUDA_MAX_RANKS];
  uint64_t out_nbytes[PRIMITIVES_CUDA_MAX_RANKS];
  primitives_cuda_many many;
} primitives_cuda_call;

/* Bytes of a rank's segment. It must be all zero when the group begins. */
size_t primitives_cuda_segment_nbytes(uint32_t slot_nbytes);

/* Blocks that a kernel of each rank may have, so that the waiting kernels of `ranks_on_device`
 * ranks and `num_groups` groups at a time fit on one device together. 0: not even one does. */
int primitives_cuda_max_blocks(int num_multiprocessors, int ranks_on_device, int num_groups);

/* Loads all kernels onto the device. To be called before the first launch: a kernel that is loaded
 * on demand may have to wait for those that run, and these wait for it. Returns 0, or -1 with
 * `error` set. */
int primitives_cuda_load(int device, primitives_cuda_error* error);

/* Whether `stream` is captured into a graph; 1, 0, or -1 with `error` set. */
int primitives_cuda_is_captured(int device, void* stream, primitives_cuda_error* error);

/* Checks the call, sets num_blocks and launches on `stream`, a cudaStream_t of the device, behind
 * what the event `last` has recorded, and records it anew: calls of a group follow each other, on
 * whatever streams. While the stream is captured into a graph that is left to the capture. Returns
 * 0, or -1 with `error` set: what, got, expected. */
int primitives_cuda_launch(int device, const primitives_cuda_ranks* ranks,
                           primitives_cuda_call call, void* stream, void* last,
                           primitives_cuda_error* error);

#ifdef __cplusplus
}
#endif
