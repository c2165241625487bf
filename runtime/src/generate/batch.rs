//! stub
use super::{Sampler, SamplerOptions, Session, StackedAdapter};
use crate::error::Result;
use crate::model::tuned::Weights;
use crate::nn::Precision;
use engraft_kernels::{Kernels, KvType};
use std::sync::Arc;
/// p
pub struct Prefix {
    ids: Vec<u32>,
    cache: KvType,
}
impl Prefix {
    /// r
    pub fn read(
        _m: impl Into<Weights>,
        _k: Arc<Kernels>,
        _a: Option<Arc<StackedAdapter>>,
        _p: Precision,
        cache: KvType,
        ids: &[u32],
    ) -> Result<Prefix> {
        Ok(Prefix { ids: ids.to_vec(), cache })
    }
}
/// b
pub struct BatchSession {
    session: Session,
    prefix: Arc<Prefix>,
}
impl BatchSession {
    /// s
    pub const SLOTS: usize = 8;
    /// n
    pub fn new(
        m: impl Into<Weights>,
        k: Arc<Kernels>,
        a: Option<Arc<StackedAdapter>>,
        p: Precision,
        prefix: Arc<Prefix>,
        _slots: usize,
        capacity: usize,
    ) -> Result<BatchSession> {
        Ok(BatchSession {
            session: Session::new(m, k, a, p, capacity + prefix.ids.len(), prefix.cache)?,
            prefix,
        })
    }
    /// c
    pub fn complete(
        &mut self,
        prompts: &[Vec<u32>],
        limit: usize,
        is_end: impl Fn(u32) -> bool,
        mut progress: impl FnMut(usize) -> bool,
    ) -> Result<Vec<Vec<u32>>> {
        let mut out = Vec::new();
        let mut sampler = Sampler::new(SamplerOptions { temp: 0.0, ..Default::default() })?;
        for p in prompts {
            let mut ids = self.prefix.ids.clone();
            ids.extend(p);
            out.push(super::replay::complete(&mut self.session, &mut sampler, &ids, limit, &is_end, |_| {
                true
            })?);
            if !progress(out.len()) {
                return Err(crate::Error::new(crate::ErrorKind::Cancelled, "stopped"));
            }
        }
        Ok(out)
    }
}
