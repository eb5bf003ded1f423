/* formats.h - one row per 4-bit format. A format is data: kernels take it as an argument. */
#ifndef BNBQ_FORMATS_H
#define BNBQ_FORMATS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct bnbq_format {
    const char *name;
    float codebook[16];   /* value of code 0..15, absmax taken as 1 */
    float thresholds[15]; /* ascending: midpoints of neighbouring values */
    uint8_t order[16];    /* code = order[number of thresholds < x]: a tie goes down */
} bnbq_format;

enum { BNBQ_FORMATS = 3 };
extern const bnbq_format bnbq_formats[BNBQ_FORMATS]; /* nf4, fp4, int4 */
extern const float bnbq_dynamic_map[256];            /* second level of double quantisation */

/* Blocks of the second level. */
enum { BNBQ_ABSMAX_BLOCK = 256 };

/* NULL when there is none of that name. */
const bnbq_format *bnbq_find_format(const char *name);
/* 32, 64, ... 4096. */
bool bnbq_valid_blocksize(int64_t blocksize);

#endif
