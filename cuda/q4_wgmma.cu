/* q4_wgmma.cu - 4-bit products of many rows on compute capability 9.0: y^T = W . x^T.
 *
 * W is the A operand of the warpgroup product, in registers: a lane loads 8 bytes of a row, which
 * are 16 weights of a step of 64, decodes them through a table of byte -> two fp32 values, scales
 * them in fp32 and rounds once, to what dequantise() gives. x is the B operand, in swizzled shared
 * memory, fed by a ring of asynchronous copies. The order of k within a step is the lanes' order of
 * loading, so x is permuted by a small kernel before; W never is.
 *
 * A block is two warpgroups that share a tile of x; two blocks share a multiprocessor, so that one
 * decodes while the other's products run. Counted in SASS for sm_90a at 128 tokens: a warp issues
 * about 230 instructions per step, the block's 8 warps 460 cycles of each scheduler's, and the step
 * keeps the tensor cores busy for 512. Few tiles of a small layer leave processors idle: then k is
 * split over blocks, and a second launch adds the parts in order.
 *
 * Rejected: decoding the next step into other registers while products run (the compiler puts the
 * loads before the products again, and the registers cost the second block); 256 tokens (one block
 * per multiprocessor).
 */
#include "hopper.cuh"
#include "q4_linear.cuh"

namespace {

enum {
    THREADS = 256,
    ROWS = 128, /* of W per block: 64 per warpgroup */
    STEP = 64,  /* columns of a step: 32 bytes of a row of W, 128 of a row of x */
    STAGES = 4, /* tiles of x in flight or in use */
    COPIES = 16 /* of the table of pairs: an 8-byte load serves half a warp at a time */
};

struct product {
    q4_operands op;
    const uint16_t *x; /* [token_tiles * TOKENS, ldx], permuted within steps; zero beyond m and k */
    int64_t ldx;
    float *partial; /* f32[gridDim.y, m, n] if k is cut into parts */
    int token_tiles, part_steps;
};

/* Position p of a step holds column column_at(p): the lanes of a fragment's row, t = 0 .. 3, have
 * columns 16t .. 16t + 15 of the step, and product j of four takes 4j .. 4j + 3 of them. */
DEVICE int column_at(int p) {
    int j = p / 16, high = p % 16 / 8, t = p % 8 / 2;
    return 16 * t + 4 * j + 2 * high + p % 2;
}

/* x[m, k] to out[rows, ldx]; one thread per 16 bytes. */
__global__ void __launch_bounds__(THREADS)
    permute_kernel(const uint16_t *x, int64_t ld, int64_t m, int64_t k, int64_t rows, int64_t ldx,
                   uint16_t *out) {
    int64_t chunks = ldx / 8, i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= rows * chunks)
        return;
    int64_t row = i / chunks, at = i % chunks * 8;
    uint32_t words[4];
#pragma unroll
    for (int pair = 0; pair < 4; pair++) { /* k is even, and pairs stay together */
        int64_t column = at / STEP * STEP + column_at((int)(at % STEP) + 2 * pair);
        words[pair] = row < m && column < k ? *(const uint32_t *)(x + row * ld + column) : 0;
    }
    *(uint4 *)(out + i * 8) = {words[0], words[1], words[2], words[3]};
}

__global__ void __launch_bounds__(THREADS)
    add_parts_kernel(const __grid_constant__ q4_operands op, const float *partial, int parts) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, size = op.m * op.n;
    if (i >= size)
        return;
    float sum = 0.0f;
    for (int part = 0; part < parts; part++)
        sum += partial[part * size + i];
    q4_store(op, i / op.n, i % op.n, sum);
}

/* What a lane has loaded of a step and not yet decoded: two rows, 8 apart. */
template <bool DOUBLE> struct slot {
    uint2 bytes[2];
    raw_scale<DOUBLE> scale[2];
};

template <bool BF16, bool DOUBLE, int TOKENS>
__global__ void __launch_bounds__(THREADS, 2)
    q4_wgmma_kernel(const __grid_constant__ product p, const __grid_constant__ q4_codebook codebook,
                    const __grid_constant__ q4_scales<DOUBLE> scales) {
#if HAS_WGMMA
    constexpr int TILE = TOKENS * TILE_BYTES;
    char *tiles = (char *)shared_memory();
    float2 *pairs = (float2 *)(tiles + STAGES * TILE);
    float *map = (float *)(pairs + 256 * COPIES);
    const int thread = (int)threadIdx.x, lane = thread % WARP, g = lane / 4, t = lane % 4;
    const int token0 = (int)blockIdx.x % p.token_tiles * TOKENS;
    const int row0 = (int)blockIdx.x / p.token_tiles * ROWS + thread / WARP * 16 + g;
    const int k = (int)p.op.k, steps = (k + STEP - 1) / STEP;
    const int first = (int)blockIdx.y * p.part_steps;
    const int last = first + p.part_steps < steps ? first + p.part_steps : steps;

    for (int i = thread; i < 256 * COPIES; i += THREADS)
        pairs[i] = {codebook.values[i / COPIES / 16], codebook.values[i / COPIES % 16]};
    float offset = 0.0f;
    if constexpr (DOUBLE) {
        for (int i = thread; i < 256; i += THREADS)
            map[i] = scales.map.values[i];
        offset = *p.op.absmax.offset;
    }

    /* A thread copies one chunk of every THREADS / 8th row. */
    const uint16_t *from = p.x + (int64_t)(token0 + thread / 8) * p.ldx + thread % 8 * 8;
    const int to = swizzled(thread / 8, thread % 8);
    auto copy_tile = [&](int step) {
        if (step < last) {
            char *tile = tiles + step % STAGES * TILE + to;
#pragma unroll
            for (int i = 0; i < TOKENS * 8 / THREADS; i++)
                copy_async16(tile + i * (THREADS / 8 * TILE_BYTES),
                             from + step * STEP + i * (THREADS / 8) * p.ldx, true);
        }
        commit_copies();
    };
    const int top = (int)lesser(row0, p.op.n - 1), rows_apart = (int)lesser(8, p.op.n - 1 - top);
    const uint8_t *bytes = p.op.qweight + (int64_t)top * (k / 2) + 8 * t;
    const uint32_t block = (uint32_t)top * (uint32_t)(k >> p.op.blocksize_log2);
    auto load = [&](int step, slot<DOUBLE> &s) {
        if (step >= last || step * STEP + 16 * t >= k)
            return; /* beyond k the weights are any, and x is zero */
        uint32_t at = block + (uint32_t)((step * STEP + 16 * t) >> p.op.blocksize_log2);
        s.bytes[0] = load_stream64(bytes + step * (STEP / 2));
        s.bytes[1] = load_stream64(bytes + step * (STEP / 2) + (int64_t)rows_apart * (k / 2));
        load_scale(p.op.absmax, at, &s.scale[0]);
        load_scale(p.op.absmax, at + (uint32_t)(rows_apart * (k >> p.op.blocksize_log2)),
                   &s.scale[1]);
    };
    auto decode = [&](slot<DOUBLE> &s, uint32_t(&a)[4][4]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float scale = decode_scale(s.scale[r], map, offset);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                uint32_t byte = (i < 4 ? s.bytes[r].x : s.bytes[r].y) >> i % 4 * 8 & 255;
                float2 pair = pairs[byte * COPIES + lane % COPIES];
                a[i / 2][i % 2 * 2 + r] = BF16 ? pack_bf16(pair.x * scale, pair.y * scale)
                                               : pack_f16(pair.x * scale, pair.y * scale);
            }
        }
    };

    for (int i = 0; i < STAGES - 1; i++)
        copy_tile(first + i);
    slot<DOUBLE> even = {}, odd = {};
    float d[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++)
        d[i] = 0.0f;
    load(first, even);
    load(first + 1, odd);
    sync_threads(); /* the tables */

    auto run_step = [&](int step, slot<DOUBLE> &now) {
        uint32_t a[4][4];
        decode(now, a);
        load(step + 2, now);
        wait_copies<STAGES - 2>();
        fence_async_proxy();
        sync_threads(); /* the tile is there, and nobody reads the one that is copied over next */
        copy_tile(step + STAGES - 1);
        uint64_t tile = tile_descriptor(shared_address(tiles + step % STAGES * TILE));
        pin(d);
        fence_products();
#pragma unroll
        for (int j = 0; j < 4; j++)
            multiply_floats<BF16>(d, a[j], step_descriptor(tile, j));
        commit_products();
        wait_products<0>();
        pin(d);
    };
    for (int step = first; step < last; step++) {
        run_step(step, even);
        slot<DOUBLE> other = odd;
        odd = even;
        even = other;
    }
    wait_copies<0>();

    const int again = reread_thread(), last_row = (int)blockIdx.x / p.token_tiles * ROWS +
                                                  again / WARP * 16 + again % WARP / 4;
    const int last_token = (int)blockIdx.x % p.token_tiles * TOKENS + again % 4 * 2;
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) {
        int row = last_row + i % 4 / 2 * 8, token = last_token + i / 4 * 8 + i % 2;
        if (row >= p.op.n || token >= p.op.m)
            continue;
        if (p.partial)
            p.partial[(blockIdx.y * p.op.m + token) * p.op.n + row] = d[i];
        else
            q4_store(p.op, token, row, d[i]);
    }
#endif
}

template <bool BF16, bool DOUBLE, int TOKENS>
bnbq_status run(bnbq_cuda_call *call, const product &p, const q4_codebook &codebook,
                int64_t parts) {
    size_t shared = (size_t)STAGES * TOKENS * TILE_BYTES + 256 * COPIES * sizeof(float2) +
                    (DOUBLE ? sizeof(dynamic_map) : 0);
    dim3 grid((unsigned)(p.token_tiles * ceil_div(p.op.n, ROWS)), (unsigned)parts);
    return launch<q4_wgmma_kernel<BF16, DOUBLE, TOKENS>>(call, grid, THREADS, shared, p, codebook,
                                                         q4_get_scales<DOUBLE>());
}

template <bool BF16, int TOKENS>
bnbq_status run(bnbq_cuda_call *call, const product &p, const q4_codebook &codebook,
                int64_t parts) {
    return p.op.absmax.codes ? run<BF16, true, TOKENS>(call, p, codebook, parts)
                             : run<BF16, false, TOKENS>(call, p, codebook, parts);
}

} // namespace

bnbq_status q4_wgmma(bnbq_cuda_call *call, const q4_operands *op, const bnbq_format *format) {
    const int64_t most_parts = 8, least_steps = 8; /* of a part */
    device_facts facts;
    TRY(get_facts(call, &facts));
    const int64_t tokens = op->m <= 64 ? 64 : 128, steps = ceil_div(op->k, STEP),
                  ldx = steps * STEP;
    const int64_t tiles = ceil_div(op->m, tokens), rows = tiles * tokens;
    int64_t parts = 2 * facts.multiprocessors / (tiles * ceil_div(op->n, ROWS));
    parts = lesser(parts, lesser(most_parts, steps / least_steps));
    const int64_t part_steps = ceil_div(steps, parts < 1 ? 1 : parts);
    parts = ceil_div(steps, part_steps);

    float *partial = nullptr;
    uint16_t *permuted;
    if (parts > 1)
        TRY(get_space(call, parts * op->m * op->n, &partial));
    TRY(get_space(call, rows * ldx, &permuted));
    TRY(launch<permute_kernel>(call, dim3((unsigned)ceil_div(rows * ldx / 8, THREADS)), THREADS, 0,
                               (const uint16_t *)op->x.data, op->x.ld, op->m, op->k, rows, ldx,
                               permuted));
    q4_codebook codebook;
    for (int i = 0; i < 16; i++)
        codebook.values[i] = format->codebook[i];
    product p = {*op, permuted, ldx, partial, (int)tiles, (int)part_steps};
    const bool bf16 = op->x.dtype == BNBQ_BF16;
    auto run_tokens = tokens == 64 ? (bf16 ? run<true, 64> : run<false, 64>)
                                   : (bf16 ? run<true, 128> : run<false, 128>);
    TRY(run_tokens(call, p, codebook, parts));
    if (parts == 1)
        return BNBQ_OK;
    return launch<add_parts_kernel>(call, dim3((unsigned)ceil_div(op->m * op->n, THREADS)), THREADS,
                                    0, *op, (const float *)partial, (int)parts);
}
