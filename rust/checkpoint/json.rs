//! The JSON of headers and indexes, read without trusting it.
//!
//! `serde_json`'s maps keep the last of two equal keys. In a table of tensors that would drop one
//! without a word, so the maps here keep all pairs, in the order of the text, for the caller to
//! compare. Nothing is allocated on the word of a number in the text, what nobody needs is skipped,
//! and what is kept is a small multiple of the text's own length.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::error::Category;

use crate::error::{Error, Result};
use crate::plan::MAX_DIMENSIONS;

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

/// Takes the name of a tensor and that of the file that it is in.
pub(super) type Sink<'a> = dyn FnMut(String, &str) -> Result<()> + 'a;

/// Reads an index's text: calls `sink` for each entry of its weight map, in order, and keeps nothing.
pub(super) fn read_weight_map(text: &str, sink: &mut Sink<'_>) -> Result<()> {
    let mut index = IndexVisitor { sink, maps: 0, refused: None };
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let read = deserializer.deserialize_map(&mut index).and_then(|()| deserializer.end());
    let IndexVisitor { maps, refused, .. } = index;
    if let Some(error) = refused {
        return Err(error);
    }
    match read {
        Err(error) if error.is_data() && maps > 0 => {
            Err(Error::checkpoint("`weight_map` in the index is not an object of file names"))
        }
        Err(error) => Err(describe("index", &error)),
        Ok(()) if maps == 0 => Err(Error::checkpoint("the index has no key `weight_map`")),
        Ok(()) => Ok(()),
    }
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

/// Reads an index, of which only the weight map matters.
struct IndexVisitor<'a, 'b> {
    sink: &'a mut Sink<'b>,
    maps: u32,
    refused: Option<Error>,
}

impl<'de> Visitor<'de> for &mut IndexVisitor<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key != "weight_map" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            self.maps += 1;
            if self.maps > 1 {
                let error = Error::checkpoint("the index has two keys `weight_map`");
                return Err(A::Error::custom(self.refused.insert(error)));
            }
            map.next_value_seed(WeightMap(self))?;
        }
        Ok(())
    }
}

/// The weight map of an index: file names by tensor.
struct WeightMap<'a, 'b, 'c>(&'a mut IndexVisitor<'b, 'c>);

impl<'de> DeserializeSeed<'de> for WeightMap<'_, '_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMap<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some((tensor, file_name)) = map.next_entry::<String, String>()? {
            if let Err(error) = (self.0.sink)(tensor, &file_name) {
                return Err(A::Error::custom(self.0.refused.insert(error)));
            }
        }
        Ok(())
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
                let texts = map.next_value::<Option<Texts>>()?;
                set_once(&mut metadata, "__metadata__", texts)?;
            } else {
                *self.current = Some(name);
                let entry = map.next_value()?;
                entries.extend(self.current.take().map(|name| (name, entry)));
            }
        }
        Ok(entries)
    }
}

/// An object of texts. Nobody needs them, but they must be as the format says.
struct Texts;

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TextsVisitor)
    }
}

struct TextsVisitor;

impl<'de> Visitor<'de> for TextsVisitor {
    type Value = Texts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Texts, A::Error> {
        while map.next_entry::<String, String>()?.is_some() {}
        Ok(Texts)
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
