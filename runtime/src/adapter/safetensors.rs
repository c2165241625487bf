//! safetensors files, checked before the `safetensors` crate sees them: the crate accepts 100 MB headers and,
//! of duplicate keys, takes the last.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::Write;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::StoredAs;
use super::exchange::{corrupt, unsupported};
use crate::error::{Error, ErrorKind, Result, told};
use crate::model::gguf::quote;
use crate::model::map::Map;

/// Longest header, in bytes.
pub const HEADER_MAX: usize = 16 << 20;
/// Most extents of a tensor: those of a pair have two, and messages print them.
const EXTENTS_MAX: usize = 8;
/// Most tensors of a file.
const TENSORS_MAX: usize = 65_536;

/// A tensor as f32.
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) values: Vec<f32>,
}

impl Tensor {
    /// A part of the module at a path.
    pub(super) fn of(path: &str, part: &str, shape: &[usize], values: Vec<f32>) -> Tensor {
        Tensor { name: format!("{path}.{part}"), shape: shape.to_vec(), values }
    }

    /// Its extents as a matrix.
    ///
    /// # Errors
    /// `Corrupt` for any other number of dimensions.
    pub(super) fn matrix(&self) -> Result<(usize, usize)> {
        match self.shape[..] {
            [rows, cols] => Ok((rows, cols)),
            _ => {
                Err(corrupt(format!("tensor {} has shape {:?}, not a matrix", quote(&self.name), self.shape)))
            }
        }
    }
}

/// Reads every tensor of a file and hands it on, one at a time.
///
/// # Errors
/// `Io`; `Corrupt` if the file breaks the format; `Unsupported` for element types other than F32, F16 and BF16;
/// those of `take`. Each names the file.
pub(super) fn read(path: &Path, mut take: impl FnMut(Tensor) -> Result<()>) -> Result<()> {
    let map = Map::open(path)?;
    read_bytes(map.as_bytes(), &mut take).map_err(|e| e.at(path.display()))
}

fn read_bytes(bytes: &[u8], take: &mut dyn FnMut(Tensor) -> Result<()>) -> Result<()> {
    let header = check(bytes)?;
    // The crate's own checks come on top; if one fails, its error is the message.
    let parsed = SafeTensors::deserialize(bytes)
        .map_err(|e| corrupt(format!("not a safetensors file: {}", told(e))))?;
    for name in header.0.keys().filter(|k| *k != METADATA) {
        let view =
            parsed.tensor(name).map_err(|e| corrupt(format!("tensor {}: {}", quote(name), told(e))))?;
        take(Tensor { name: name.clone(), shape: view.shape().to_vec(), values: floats(&view) })?;
    }
    Ok(())
}

fn floats(view: &TensorView<'_>) -> Vec<f32> {
    let bytes = view.data();
    match view.dtype() {
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        // `check` let only these three through.
        _ => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
    }
}

const METADATA: &str = "__metadata__";

/// A header's keys, each once.
struct Header(BTreeMap<String, Field>);

enum Field {
    Tensor(Described),
    /// The writer's own strings; not interpreted.
    Metadata,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Header, D::Error> {
        deserializer.deserialize_map(Once).map(Header)
    }
}

/// Reads a map, refusing duplicate keys and more than the allowed number.
struct Once;

impl<'de> Visitor<'de> for Once {
    type Value = BTreeMap<String, Field>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> std::result::Result<Self::Value, M::Error> {
        let mut found = BTreeMap::new();
        while let Some(key) = map.next_key::<String>()? {
            let field = match key == METADATA {
                true => map.next_value::<BTreeMap<String, String>>().map(|_| Field::Metadata)?,
                false => Field::Tensor(map.next_value()?),
            };
            if found.len() > TENSORS_MAX {
                return Err(M::Error::custom(format!("more than {TENSORS_MAX} tensors")));
            }
            if found.contains_key(&key) {
                return Err(M::Error::custom(format!("{} is described twice", quote(&key))));
            }
            found.insert(key, field);
        }
        Ok(found)
    }
}

/// The rules: a header within its cap, unique names, readable types, sizes that match shapes, and data without
/// holes or overlaps that ends where the file does.
fn check(bytes: &[u8]) -> Result<Header> {
    let length = bytes.first_chunk().map(|b| u64::from_le_bytes(*b));
    let length = length.ok_or_else(|| corrupt("not a safetensors file: shorter than its length field"))?;
    if length > HEADER_MAX as u64 {
        return Err(corrupt(format!(
            "its header claims {length} bytes; at most {HEADER_MAX} are allowed, or it isn't a safetensors file"
        )));
    }
    let end = 8 + length as usize;
    let header = bytes.get(8..end).ok_or_else(|| corrupt("truncated within its header; fetch it again"))?;
    let header: Header =
        serde_json::from_slice(header).map_err(|e| corrupt(format!("its header: {}", told(e))))?;
    let mut spans = Vec::with_capacity(header.0.len());
    for (name, field) in &header.0 {
        if let Field::Tensor(t) = field {
            spans.push((
                t.data_offsets,
                size(t).map_err(|e| e.at(format_args!("tensor {}", quote(name))))?,
                name,
            ));
        }
    }
    spans.sort_unstable();
    let mut at = 0;
    for ([from, to], size, name) in spans {
        if from != at || to.checked_sub(from) != Some(size) {
            let name = quote(name);
            return Err(corrupt(format!(
                "tensor {name} lies at {from} to {to}; expected {size} bytes from {at}"
            )));
        }
        at = to;
    }
    let held = (bytes.len() - end) as u64;
    if at != held {
        return Err(corrupt(format!("{held} bytes of data, but the header describes {at}; fetch it again")));
    }
    Ok(header)
}

/// Bytes of a tensor.
fn size(t: &Described) -> Result<u64> {
    let element = match &*t.dtype {
        "F32" => 4,
        "F16" | "BF16" => 2,
        other => {
            return Err(unsupported(format!(
                "type {} is not supported; F32, F16 and BF16 are",
                quote(other)
            )));
        }
    };
    if t.shape.len() > EXTENTS_MAX {
        return Err(corrupt(format!("{} extents; at most {EXTENTS_MAX} are allowed", t.shape.len())));
    }
    let product = t.shape.iter().try_fold(element, |n: u64, d| n.checked_mul(*d));
    product.filter(|n| *n > 0).ok_or_else(|| corrupt(format!("shape {:?} is empty or too large", t.shape)))
}

/// Writes a file the way PEFT does, with metadata `{"format": "pt"}`.
///
/// # Errors
/// `NonFinite` for a number that overflows f16; `Io`.
pub(super) fn write(out: &mut dyn Write, tensors: &[Tensor], precision: StoredAs) -> Result<()> {
    let mut encoded = Vec::with_capacity(tensors.len());
    for t in tensors {
        encoded.push((t, precision.encode(&t.values).map_err(|e| e.at(&t.name))?));
    }
    let dtype = match precision {
        StoredAs::F32 => Dtype::F32,
        StoredAs::F16 => Dtype::F16,
    };
    let misuse = |e| Error::new(ErrorKind::Misuse, format!("writing safetensors: {e}"));
    let mut views = Vec::with_capacity(encoded.len());
    for (t, bytes) in &encoded {
        views.push((&*t.name, TensorView::new(dtype, t.shape.clone(), bytes).map_err(misuse)?));
    }
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(misuse)?;
    out.write_all(&bytes).map_err(|e| Error::io("writing safetensors", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    fn outcome(bytes: &[u8]) -> Result<usize> {
        let mut n = 0;
        read_bytes(bytes, &mut |_| {
            n += 1;
            Ok(())
        })
        .map(|()| n)
    }

    #[test]
    fn good_files_are_read() {
        let one =
            r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2,1],"data_offsets":[0,4]}}  "#;
        assert_eq!(outcome(&file(one, &[0; 4])).expect("a good file"), 1);
        assert_eq!(outcome(&file("{}", &[])).expect("an empty one"), 0);
    }

    #[test]
    fn bad_files_are_refused_by_what_is_wrong() {
        let tensor = |name: &str, dtype: &str, shape: &str, from: u64, to: u64| {
            format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
        };
        let a = tensor("a", "F32", "[1]", 0, 4);
        for (header, data, word) in [
            (format!("{{{a},{a}}}"), 4, "twice"),
            (format!("{{{a},{}}}", tensor("b", "F32", "[1]", 2, 6)), 6, "lies at 2"),
            (format!("{{{a},{}}}", tensor("b", "F32", "[1]", 8, 12)), 12, "lies at 8"),
            (format!("{{{}}}", tensor("a", "F32", "[2]", 0, 4)), 4, "8 bytes"),
            (format!("{{{}}}", tensor("a", "F32", "[1]", 4, 0)), 4, "lies at 4"),
            (format!("{{{}}}", tensor("a", "I64", "[1]", 0, 8)), 8, "I64"),
            (format!("{{{}}}", tensor("a", "F32", "[9223372036854775808,4]", 0, 4)), 4, "shape"),
            (format!("{{{}}}", tensor("a", "F32", "[0]", 0, 0)), 0, "shape"),
            (format!("{{{a}}}"), 5, "5 bytes of data"),
            (format!("{{{a}}}"), 3, "3 bytes of data"),
            (a.clone(), 4, "header"),
            (format!("{{{}}}", a.replace("dtype", "kind")), 4, "kind"),
            (format!("{{{}}}", a.replace("}", ",\"dtype\":\"F16\"}")), 4, "duplicate field"),
        ] {
            let error = outcome(&file(&header, &vec![0; data])).expect_err(&header);
            assert!(error.message().contains(word), "{header}: {error}");
        }
        let long = ((HEADER_MAX + 1) as u64).to_le_bytes();
        assert!(
            outcome(&[&long[..], &vec![b' '; HEADER_MAX + 1]].concat())
                .expect_err("long")
                .message()
                .contains("at most")
        );
        let whole = file(&format!("{{{a}}}"), &[0; 4]);
        for n in 0..whole.len() {
            assert!(outcome(&whole[..n]).is_err(), "cut at {n}");
        }
    }
}
