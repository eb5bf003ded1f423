/* amx_emulator.c - checks of the tile emulation itself (csrc/kernels/amx_tiles.h).
 *
 * Without an argument: small products whose results tell the documented order of rounding from
 * other orders. With a number: the n-th misuse, each of which must abort; 0 is none. Prints the
 * number of misuses.
 */
#define BNBQ_AMX_EMULATED
#include "../csrc/kernels/amx_tiles.h"

static uint16_t bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)(bits >> 16);
}

static void expect(float got, float want, const char *what) {
    if (memcmp(&got, &want, 4)) {
        fprintf(stderr, "FAILED %s: %a, want %a\n", what, (double)got, (double)want);
        exit(1);
    }
}

/* One row of A with `count` pairs times one column of B, added to c. */
static float dot(const float *a, const float *b, int count, float c) {
    amx_config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    config.rows[0] = config.rows[1] = 1;
    config.colsb[0] = config.colsb[2] = 4;
    config.rows[2] = (uint8_t)count;
    config.colsb[1] = (uint16_t)(4 * count);
    amx_configure(&config);
    uint16_t left[32], right[32];
    for (int i = 0; i < 2 * count; i++) {
        left[i] = bf16(a[i]);
        right[i] = bf16(b[i]);
    }
    amx_load(0, &c, 4);
    amx_load(1, left, 64);
    amx_load(2, right, 4);
    amx_dp_bf16(0, 1, 2);
    amx_store(0, &c, 4);
    amx_release();
    return c;
}

static void check_bf16(void) {
    const float ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    /* Even and odd elements are summed apart from 0, then together, then added to C. */
    expect(dot((float[]){0x1p24f, 1, 1, 1, 1, 1}, ones, 3, -0x1p24f), 4, "order of sums");
    expect(dot((float[]){1, 0, 0, 0, 0, 1}, ones, 3, 0x1p24f), 0x1p24f + 2, "C comes last");
    expect(dot((float[]){0x1.02p0f, 0, -1, 0}, (float[]){0x1.02p0f, 0, 1, 0}, 2, 0), 0x1.01p-6f,
           "exact products");
    expect(dot((float[]){0x1p-127f, 0}, (float[]){0x1p100f, 0}, 1, 0), 0, "denormal operand");
    expect(dot((float[]){0x1p-100f, 0}, (float[]){0x1p-27f, 0}, 1, 0), 0, "denormal product");
    expect(dot((float[]){0, 0}, ones, 1, 0x1p-127f), 0, "denormal C");
    expect(dot((float[]){-0x1p-100f, 0}, (float[]){0x1p-26f, 0}, 1, 0), -0x1p-126f, "smallest");
}

static void check_s8(void) {
    amx_config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 3; i++) {
        config.rows[i] = 16;
        config.colsb[i] = 64;
    }
    config.rows[0] = config.rows[1] = 5;    /* C and A: 5 rows */
    config.colsb[0] = config.colsb[2] = 12; /* C and B: 3 columns */
    int8_t a[16][64], b[16][64];
    int32_t c[16][16], want[16][16];
    for (int r = 0; r < 16; r++)
        for (int i = 0; i < 64; i++) {
            a[r][i] = (int8_t)(r * 31 + i * 17);
            b[r][i] = (int8_t)(r * 59 - i * 23);
        }
    memset(a[1], -128, 64);
    for (int r = 0; r < 16; r++)
        b[r][4] = b[r][5] = b[r][6] = b[r][7] = -128;
    memset(c, 7, sizeof c);
    memcpy(want, c, sizeof c);
    amx_configure(&config);
    amx_load(1, a, 64);
    amx_load(2, b, 64);
    amx_zero(0);
    amx_dp_s8(0, 1, 2);
    amx_dp_s8(0, 1, 2);
    amx_store(0, c, 64);
    for (int r = 0; r < 5; r++)
        for (int i = 0; i < 3; i++) {
            want[r][i] = 0;
            for (int k = 0; k < 64; k++)
                want[r][i] += 2 * a[r][k] * b[k / 4][4 * i + k % 4];
        }
    if (memcmp(c, want, sizeof c) || c[1][1] != 2 * 64 * 16384) {
        fprintf(stderr, "FAILED int8 tile product\n");
        exit(1);
    }
    for (int r = 0; r < 16; r++)
        for (int i = 0; i < 16; i++)
            if ((r >= 5 || i >= 3) && amx_emulated.tile[0].i32[r][i])
                fprintf(stderr, "FAILED: something outside the configured shape\n"), exit(1);
    amx_release();
}

static void check_transpose(void) {
    int32_t tile[16][16], y[16 * 19];
    for (int i = 0; i < 256; i++)
        tile[i / 16][i % 16] = i;
    for (int rows = 1; rows <= 16; rows++)
        for (int cols = 1; cols <= 16; cols++) {
            memset(y, 0xff, sizeof y);
            amx_store_transposed(tile, rows, cols, y, 19);
            for (int i = 0; i < 16 * 19; i++)
                if (y[i] != (i % 19 < rows && i / 19 < cols ? i % 19 * 16 + i / 19 : -1))
                    fprintf(stderr, "FAILED transpose\n"), exit(1);
        }
}

enum { MISUSES = 13 };

static void misuse(int number) {
    static uint8_t memory[1024];
    amx_config config;
    memset(&config, 0, sizeof config);
    config.palette = number == 1 ? 2 : 1;
    config.start_row = number == 2;
    config.reserved[3] = number == 3;
    for (int i = 0; i < 4; i++) {
        config.rows[i] = 16;
        config.colsb[i] = 64;
    }
    config.rows[0] = number == 4 ? 17 : 16;
    config.colsb[1] = number == 5 ? 68 : 64;
    config.rows[2] = number == 6 ? 0 : 16;
    config.rows[8] = number == 7;
    config.colsb[3] = number == 8 ? 62 : 64;
    if (number == 9)
        config.rows[1] = 15; /* of A; C has 16 */
    if (number == 10)
        config.rows[2] = 15; /* of B; A has 16 pairs */
    if (number != 11)
        amx_configure(&config);
    amx_load(0, memory, 64);
    amx_load(1, memory, 64);
    amx_load(number == 12 ? 4 : 2, memory, 64);
    amx_load(3, memory, 64);
    amx_dp_bf16(0, 1, number == 13 ? 1 : 2);
    amx_release();
}

int main(int argc, char **argv) {
    if (argc > 1) {
        misuse(atoi(argv[1]));
        return 0;
    }
    check_bf16();
    check_s8();
    check_transpose();
    printf("%d\n", MISUSES);
    return 0;
}
