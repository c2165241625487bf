//! The result of reading another tool's adapter, and how its settings are read.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde_json::{Map as Object, Value};

use super::exchange::{Exchange, corrupt};
use crate::error::{Error, Result, told};
use crate::model::gguf::quote;

/// Longest file of settings, in bytes.
const JSON_MAX: u64 = 1 << 20;

/// An imported foreign adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Imported {
    /// The adapter.
    pub exchange: Exchange,
    /// What was ignored on import.
    pub warnings: Vec<String>,
}

/// Reads a JSON object, refusing duplicate keys at the top level.
pub(super) fn read_json(file: &Path) -> Result<Object<String, Value>> {
    let place = file.display();
    let mut text = Vec::new();
    let opened = File::open(file).and_then(|f| f.take(JSON_MAX + 1).read_to_end(&mut text));
    opened.map_err(|e| Error::io(format!("reading {place}"), e))?;
    if text.len() as u64 > JSON_MAX {
        return Err(corrupt(format!("{place}: longer than {JSON_MAX} bytes, too long for a settings file")));
    }
    let parsed = serde_json::from_slice(&text).map_err(|e| corrupt(format!("{place}: {}", told(e))))?;
    let Unique(object) = parsed;
    Ok(object)
}

struct Unique(Object<String, Value>);

impl<'de> de::Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Unique, D::Error> {
        deserializer.deserialize_map(Once).map(Unique)
    }
}

struct Once;

impl<'de> Visitor<'de> for Once {
    type Value = Object<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of settings")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> std::result::Result<Self::Value, M::Error> {
        let mut found = Object::new();
        while let Some((key, value)) = map.next_entry::<String, Value>()? {
            if found.contains_key(&key) {
                return Err(de::Error::custom(format!("key {} occurs twice", quote(&key))));
            }
            found.insert(key, value);
        }
        Ok(found)
    }
}
