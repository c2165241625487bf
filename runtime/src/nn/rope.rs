//! Rotary position embedding (Su et al., arXiv 2104.09864) on interleaved pairs, as GGUFs of the
//! llama architecture store their query and key rows.

use crate::model::ModelConfig;

/// f32 words of the table for `positions`.
pub fn table_words(config: &ModelConfig, positions: usize) -> usize {
    positions * config.rope_dim
}

/// Fills per position the cosines, then the sines, of pos · base^(−2i/dim) / factor.
///
/// `freq_factors` `[rope_dim / 2]` divide the frequencies (llama 3's `rope_freqs.weight`).
pub fn table(config: &ModelConfig, freq_factors: Option<&[f32]>, out: &mut [f32]) {
    let half = config.rope_dim / 2;
    for (pos, row) in out.chunks_exact_mut(config.rope_dim).enumerate() {
        for i in 0..half {
            let exponent = -2.0 * i as f64 / config.rope_dim as f64;
            let freq = f64::from(config.rope_base).powf(exponent)
                / freq_factors.map_or(1.0, |f| f64::from(f[i]))
                / f64::from(config.rope_scale);
            let (sin, cos) = (pos as f64 * freq).sin_cos();
            row[i] = cos as f32;
            row[half + i] = sin as f32;
        }
    }
}
