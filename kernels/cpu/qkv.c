/* QK-norm, rotary embedding and value embeddings: see ../qkv.py.

   B batch, T time, H query heads, K kv heads, N = H + 2K heads of the projection, C head dim. q, k, v and their
   gradients have any strides over batch, time and heads; gates (B, T, K) and value embeddings (B, T, K, C) are
   contiguous, or NULL. Strides come as arrays of three. */
#include "common.h"

static inline float value_gate(element gate) { return 3 / (1 + exponential(-load(gate))); }

/* rstd: (B, T, H + K). cos, sin: (T, C/2), with a stride cos_b over the batch, which may be 0. */
void attention_inputs(const element *qkv, const float *cos, const float *sin, const element *gate,
                      const element *value_embedding, element *q, element *k, element *v, float *rstd,
                      const int64_t *qkv_s, const int64_t *q_s, const int64_t *k_s, const int64_t *v_s, int64_t cos_b,
                      int64_t B, int64_t T, int64_t H, int64_t K, int64_t C, double gain, double eps) {
    int64_t half = C / 2;
    PARALLEL(B * T * (H + 2 * K) * C)
    for (int64_t token = 0; token < B * T; token++) {
        int64_t i = token / T, t = token % T;
        const element *x = qkv + i * qkv_s[0] + t * qkv_s[1];
        const float *c = cos + i * cos_b + t * half, *s = sin + i * cos_b + t * half;
        for (int64_t h = 0; h < H + K; h++, x += qkv_s[2]) {
            element *y = h < H ? q + i * q_s[0] + t * q_s[1] + h * q_s[2] : k + i * k_s[0] + t * k_s[1] + (h - H) * k_s[2];
            float squares = 0;
            VECTOR_SUM(squares)
            for (int64_t j = 0; j < C; j++) squares += load(x[j]) * load(x[j]);
            float r = 1 / sqrtf(squares / C + (float)eps), scale = r * (float)gain;
            rstd[token * (H + K) + h] = r;
            VECTOR
            for (int64_t j = 0; j < half; j++) {
                float first = scale * load(x[j]), second = scale * load(x[half + j]);
                y[j] = rounded(first * c[j] + second * s[j]);
                y[half + j] = rounded(second * c[j] - first * s[j]);
            }
        }
        for (int64_t h = 0; h < K; h++, x += qkv_s[2]) {
            element *y = v + i * v_s[0] + t * v_s[1] + h * v_s[2];
            float g = gate ? value_gate(gate[token * K + h]) : 0;
            const element *e = gate ? value_embedding + (token * K + h) * C : x;
            VECTOR
            for (int64_t j = 0; j < C; j++) y[j] = rounded(load(x[j]) + g * load(e[j]));
        }
    }
}

/* dqkv: contiguous. q and k: what forward returned, from which the normalised projections are recovered. */
void attention_inputs_backward(const element *dq, const element *dk, const element *dv, const element *q,
                               const element *k, const float *cos, const float *sin, const element *gate,
                               const element *value_embedding, const float *rstd, element *dqkv, element *dgate,
                               element *dvalue_embedding, const int64_t *dq_s, const int64_t *dk_s, const int64_t *dv_s,
                               const int64_t *q_s, const int64_t *k_s, int64_t cos_b, int64_t B, int64_t T, int64_t H,
                               int64_t K, int64_t C, double gain) {
    int64_t half = C / 2;
    float inverse = 1 / (float)gain;
    PARALLEL(B * T * (H + 2 * K) * C)
    for (int64_t token = 0; token < B * T; token++) {
        int64_t i = token / T, t = token % T;
        element *dx = dqkv + token * (H + 2 * K) * C;
        const float *c = cos + i * cos_b + t * half, *s = sin + i * cos_b + t * half;
        for (int64_t h = 0; h < H + K; h++, dx += C) {
            const element *y = h < H ? q + i * q_s[0] + t * q_s[1] + h * q_s[2] : k + i * k_s[0] + t * k_s[1] + (h - H) * k_s[2];
            const element *dy = h < H ? dq + i * dq_s[0] + t * dq_s[1] + h * dq_s[2] : dk + i * dk_s[0] + t * dk_s[1] + (h - H) * dk_s[2];
            float dot = 0; /* a rotation leaves it unchanged */
            VECTOR_SUM(dot)
            for (int64_t j = 0; j < C; j++) dot += load(dy[j]) * load(y[j]);
            float scale = rstd[token * (H + K) + h] * (float)gain, share = dot * inverse * inverse / C;
            VECTOR
            for (int64_t j = 0; j < half; j++) { /* the gradient of the normalised row, turned back by the angle */
                float first = scale * (load(dy[j]) - share * load(y[j]));
                float second = scale * (load(dy[half + j]) - share * load(y[half + j]));
                dx[j] = rounded(first * c[j] - second * s[j]);
                dx[half + j] = rounded(first * s[j] + second * c[j]);
            }
        }
        for (int64_t h = 0; h < K; h++, dx += C) {
            const element *dy = dv + i * dv_s[0] + t * dv_s[1] + h * dv_s[2];
            VECTOR
            for (int64_t j = 0; j < C; j++) dx[j] = dy[j];
            if (!gate) continue;
            int64_t at = token * K + h;
            const element *e = value_embedding + at * C;
            element *de = dvalue_embedding + at * C;
            float g = value_gate(gate[at]), dot = 0;
            VECTOR_SUM(dot)
            for (int64_t j = 0; j < C; j++) {
                dot += load(dy[j]) * load(e[j]);
                de[j] = rounded(g * load(dy[j]));
            }
            dgate[at] = rounded(dot * g * (1 - g / 3));
        }
    }
}
