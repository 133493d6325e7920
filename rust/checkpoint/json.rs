//! The JSON of headers and indexes, read without trusting it.
//!
//! `serde_json`'s maps keep the last of two equal keys. In a table of tensors that would drop one
//! without a word, so the maps here keep all pairs, in the order of the text, for the caller to
//! compare. Nothing is allocated on the word of a number in the text, and what is allocated is
//! a small multiple of the text's own length.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::error::Category;

use crate::error::{Error, Result};

/// More dimensions than any tensor library has.
const MAX_DIMENSIONS: usize = 64;

/// A header as written: its tensors by name, in order.
pub(super) type RawHeader = Vec<(String, RawEntry)>;

/// One tensor as written.
#[derive(Debug)]
pub(super) struct RawEntry {
    pub(super) dtype: String,
    pub(super) shape: Vec<u64>,
    pub(super) begin: u64,
    pub(super) end: u64,
}

/// A JSON object with all its pairs, in order.
#[derive(Debug)]
pub(super) struct Pairs<V>(pub(super) Vec<(String, V)>);

/// Reads a header's text. An error in an entry names its tensor.
pub(super) fn read_header(text: &str) -> Result<RawHeader> {
    let mut current = None;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let header = HeaderVisitor { current: &mut current }
        .deserialize(&mut deserializer)
        .and_then(|header| deserializer.end().map(|()| header));
    header.map_err(|error| {
        let error = describe("header", &error);
        match current {
            Some(name) => error.tensor(name),
            None => error,
        }
    })
}

/// Reads an index's text: tensor name and shard file name, in order.
pub(super) fn read_weight_map(text: &str) -> Result<Vec<(String, String)>> {
    let pairs: Pairs<WeightMapOrOther> =
        serde_json::from_str(text).map_err(|error| describe("index", &error))?;
    let mut maps = pairs.0.into_iter().filter(|(key, _)| key == "weight_map");
    match (maps.next(), maps.next()) {
        (Some((_, WeightMapOrOther::Map(map))), None) => Ok(map.0),
        (Some(_), None) => {
            Err(Error::checkpoint("`weight_map` in the index is not an object of file names"))
        }
        (Some(_), Some(_)) => Err(Error::checkpoint("the index has two keys `weight_map`")),
        (None, _) => Err(Error::checkpoint("the index has no key `weight_map`")),
    }
}

/// A value of an index's outer object, of which only an object of strings matters.
#[derive(Deserialize)]
#[serde(untagged)]
enum WeightMapOrOther {
    Map(Pairs<String>),
    Other(IgnoredAny),
}

/// A config's text with a zero for each `NaN` and `Infinity`, which Python writes and JSON lacks.
///
/// Places in the text stay what they are. Only for readers to whom those numbers do not matter.
pub(super) fn without_infinities(text: &str) -> Cow<'_, str> {
    const WORDS: [&str; 2] = ["NaN", "Infinity"];
    if !WORDS.iter().any(|word| text.contains(word)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut is_string = false;
    while let Some(next) = rest.chars().next() {
        let begins = !is_string && (out.is_empty() || out.ends_with(NUMBERS_FOLLOW));
        let word = WORDS.into_iter().find(|word| begins && rest.starts_with(word));
        let length = match (word, next) {
            (Some(word), _) => word.len(),
            // What is escaped cannot end a string.
            (None, '\\') if is_string => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, other) => other.len_utf8(),
        };
        is_string ^= next == '"';
        let (taken, left) = rest.split_at(length);
        match word {
            Some(word) => out.extend(["0", &" ".repeat(word.len() - 1)]),
            None => out.push_str(taken),
        }
        rest = left;
    }
    Cow::Owned(out)
}

/// What may stand before a number.
const NUMBERS_FOLLOW: [char; 8] = [':', ',', '[', '-', ' ', '\t', '\n', '\r'];

fn describe(what: &str, error: &serde_json::Error) -> Error {
    Error::checkpoint(match error.classify() {
        Category::Data => format!("the {what} is not as it should be: {error}"),
        _ => format!("the {what} is not valid JSON: {error}"),
    })
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Pairs<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for PairsVisitor<V> {
            type Value = Pairs<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<V>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor(PhantomData))
    }
}

/// Reads a header and keeps note of the tensor it is at.
struct HeaderVisitor<'a> {
    current: &'a mut Option<String>,
}

impl<'de> DeserializeSeed<'de> for HeaderVisitor<'_> {
    type Value = RawHeader;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<RawHeader, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderVisitor<'_> {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut entries = Vec::new();
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                // Nobody needs the text, but it must be as the format says.
                let text = map.next_value::<Option<BTreeMap<String, String>>>()?;
                set_once(&mut metadata, "__metadata__", text)?;
            } else {
                let name = self.current.insert(name);
                entries.push((name.clone(), map.next_value()?));
                *self.current = None;
            }
        }
        Ok(entries)
    }
}

/// The keys of a tensor's entry; any other is an error, for it might change the meaning.
#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Key {
    Dtype,
    Shape,
    DataOffsets,
}

impl<'de> Deserialize<'de> for RawEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntryVisitor)
    }
}

struct EntryVisitor;

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = RawEntry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `dtype`, `shape` and `data_offsets`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawEntry, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key()? {
            match key {
                Key::Dtype => set_once(&mut dtype, "dtype", map.next_value()?)?,
                Key::Shape => set_once(&mut shape, "shape", map.next_value()?)?,
                Key::DataOffsets => set_once(&mut offsets, "data_offsets", map.next_value()?)?,
            }
        }
        let Numbers(offsets) = offsets.ok_or_else(|| A::Error::missing_field("data_offsets"))?;
        let Ok([begin, end]) = <[u64; 2]>::try_from(offsets) else {
            return Err(A::Error::custom("`data_offsets` must be two numbers"));
        };
        let dtype = dtype.ok_or_else(|| A::Error::missing_field("dtype"))?;
        let Numbers(shape) = shape.ok_or_else(|| A::Error::missing_field("shape"))?;
        Ok(RawEntry { dtype, shape, begin, end })
    }
}

fn set_once<T, E: serde::de::Error>(
    slot: &mut Option<T>,
    key: &'static str,
    value: T,
) -> Result<(), E> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(E::duplicate_field(key)),
    }
}

/// A short list of non-negative whole numbers.
struct Numbers(Vec<u64>);

impl<'de> Deserialize<'de> for Numbers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(NumbersVisitor)
    }
}

struct NumbersVisitor;

impl<'de> Visitor<'de> for NumbersVisitor {
    type Value = Numbers;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of numbers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Numbers, A::Error> {
        let mut numbers = Vec::new();
        while let Some(number) = list.next_element()? {
            if numbers.len() == MAX_DIMENSIONS {
                return Err(A::Error::custom(format_args!("more than {MAX_DIMENSIONS} numbers")));
            }
            numbers.push(number);
        }
        Ok(Numbers(numbers))
    }
}
