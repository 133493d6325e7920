//! Which token each row of a vocabulary stands for, read from a model's tokenizer.
//!
//! Two models may have embeddings of one shape and yet other tokens in their rows. Merging those
//! gives noise, and no header shows it. So the tokens are compared by id: those of `tokenizer.json`
//! (whatever its kind: a map from tokens to ids, or a list in the order of ids) with the tokens added
//! to it, of `vocab.json` and `added_tokens.json`, or of `vocab.txt`. How text is cut into tokens
//! (merges, normalizers, scores) is not compared: it gives no row another meaning, and the output
//! has the donor's.
//!
//! Files with the same bytes are not parsed. Others are read in a stream, and of each token a hash
//! is kept; the few that are shown are read again. So a comparison takes some megabytes for the
//! vocabularies that there are, and never more than [`MOST_TOKENS`] allow, whatever a file says.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result};
use crate::io;
use crate::plan::InputFile;

/// Twice the size of the longest tokenizers; a file may be one token, which is held twice.
const LONGEST: u64 = 64 << 20;
/// More tokens than any tokenizer has; 32 bytes each are needed while two are compared.
const MOST_TOKENS: usize = 2 << 20;
/// How many differing tokens are shown.
const SHOWN: usize = 3;
/// As much of a token as is shown, in characters.
const SHOWN_CHARACTERS: usize = 40;
/// Bytes that are read at a time.
const CHUNK: usize = 64 << 10;

/// How two vocabularies differ.
#[derive(Debug, Default, Serialize)]
pub struct Difference {
    /// Ids that have a token in both.
    pub shared: u64,
    /// Ids whose tokens differ.
    pub differing: u64,
    /// Ids that have a token in the first one only, and in the second one only.
    pub lacking: (u64, u64),
    /// The first differing ids with both tokens, then the first that one of them lacks.
    pub examples: Vec<(u64, Option<String>, Option<String>)>,
}

/// Compares two vocabularies by id; none if no id below `rows` has another token.
///
/// Each is given by its files, whose names tell what they are. Where a file adds tokens, they stand
/// before those of other files.
pub fn compare(one: &[PathBuf], other: &[PathBuf], rows: u64) -> Result<Option<Difference>> {
    if one.len() == other.len() && same_names(one, other) && all_equal(one, other)? {
        return Ok(None);
    }
    let (tokens, others) = (Tokens::read(one, rows)?, Tokens::read(other, rows)?);
    let mut difference = Difference::default();
    let (mut differing, mut lacking) = (Vec::new(), Vec::new());
    let note = |list: &mut Vec<u64>, id| {
        if list.len() < SHOWN {
            list.push(id);
        }
    };
    for (id, first, second) in Joined::of(&tokens, &others) {
        match (first, second) {
            (Some(first), Some(second)) => {
                difference.shared += 1;
                if first != second {
                    difference.differing += 1;
                    note(&mut differing, id);
                }
            }
            (Some(_), None) => {
                difference.lacking.0 += 1;
                note(&mut lacking, id);
            }
            _ => {
                difference.lacking.1 += 1;
                note(&mut lacking, id);
            }
        }
    }
    if differing.is_empty() && lacking.is_empty() {
        return Ok(None);
    }
    let shown = [differing, lacking].concat();
    let (texts, other_texts) = (texts(one, &shown)?, texts(other, &shown)?);
    let text = |texts: &BTreeMap<u64, String>, id: &u64| texts.get(id).cloned();
    difference.examples =
        shown.iter().map(|id| (*id, text(&texts, id), text(&other_texts, id))).collect();
    Ok(Some(difference))
}

fn same_names(one: &[PathBuf], other: &[PathBuf]) -> bool {
    one.iter().zip(other).all(|(one, other)| one.file_name() == other.file_name())
}

fn all_equal(one: &[PathBuf], other: &[PathBuf]) -> Result<bool> {
    for (one, other) in one.iter().zip(other) {
        if !equal_bytes(one, other)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether two files have the same bytes.
fn equal_bytes(one: &Path, other: &Path) -> Result<bool> {
    let (mut first, size) = open(one)?;
    let (mut second, other_size) = open(other)?;
    if size != other_size {
        return Ok(false);
    }
    let (mut bytes, mut other_bytes) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut left = size;
    while left > 0 {
        let length = (CHUNK as u64).min(left) as usize;
        read(&mut first, &mut bytes[..length], one)?;
        read(&mut second, &mut other_bytes[..length], other)?;
        if bytes[..length] != other_bytes[..length] {
            return Ok(false);
        }
        left -= length as u64;
    }
    Ok(true)
}

fn read(file: &mut impl Read, bytes: &mut [u8], path: &Path) -> Result<()> {
    file.read_exact(bytes).map_err(|error| Error::io("read the file", error).file(path))
}

/// Opens a file of a tokenizer, and tells its size.
fn open(path: &Path) -> Result<(File, u64)> {
    let file = io::open_read_only(path)?;
    let size = InputFile::of(&file, path)?.size;
    if size > LONGEST {
        return Err(Error::checkpoint("the file is too long for a tokenizer")
            .file(path)
            .expected(format_args!("at most {LONGEST} bytes"))
            .found(size));
    }
    Ok((file, size))
}

/// The hash of each token, by id.
struct Tokens(Vec<(u64, u64)>);

impl Tokens {
    /// Reads the tokens whose ids are below `rows`.
    fn read(files: &[PathBuf], rows: u64) -> Result<Self> {
        let mut tokens = Vec::new();
        for path in files {
            each_token(path, &mut |id, is_added, token| {
                if id >= rows.min(u64::MAX / 2) {
                    return Ok(());
                }
                if tokens.len() == MOST_TOKENS {
                    return Err(format!("more than {MOST_TOKENS} tokens"));
                }
                // An added token stands before one of the model with the same id.
                tokens.push((2 * id + u64::from(is_added), hash(token)));
                Ok(())
            })?;
        }
        tokens.sort_unstable();
        tokens.dedup();
        // Tokens that claim one id in one place are taken together: they are like no other's one.
        tokens.dedup_by(|(key, hash), (kept, kept_hash)| {
            *kept_hash ^= if key == kept { *hash } else { 0 };
            key == kept
        });
        let mut tokens: Vec<_> = tokens.into_iter().map(|(key, hash)| (key / 2, hash)).collect();
        tokens.dedup_by(|(id, hash), (kept, kept_hash)| {
            *kept_hash = if id == kept { *hash } else { *kept_hash };
            id == kept
        });
        Ok(Self(tokens))
    }
}

fn hash(token: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    token.hash(&mut hasher);
    hasher.finish()
}

/// Ids in order with the tokens of both.
struct Joined<'a> {
    one: &'a [(u64, u64)],
    other: &'a [(u64, u64)],
}

impl<'a> Joined<'a> {
    fn of(one: &'a Tokens, other: &'a Tokens) -> Self {
        Self { one: &one.0, other: &other.0 }
    }
}

impl Iterator for Joined<'_> {
    type Item = (u64, Option<u64>, Option<u64>);

    fn next(&mut self) -> Option<Self::Item> {
        let heads = (self.one.first(), self.other.first());
        let id = match heads {
            (Some(one), Some(other)) => one.0.min(other.0),
            (Some((id, _)), None) | (None, Some((id, _))) => *id,
            (None, None) => return None,
        };
        let take = |list: &mut &[(u64, u64)]| match list.split_first() {
            Some(((head, hash), rest)) if *head == id => {
                *list = rest;
                Some(*hash)
            }
            _ => None,
        };
        Some((id, take(&mut self.one), take(&mut self.other)))
    }
}

/// The tokens with some ids, as they are shown.
fn texts(files: &[PathBuf], ids: &[u64]) -> Result<BTreeMap<u64, String>> {
    let mut found: BTreeMap<u64, (bool, Vec<String>)> = BTreeMap::new();
    for path in files {
        each_token(path, &mut |id, is_added, token| {
            if ids.contains(&id) {
                let (was_added, tokens) = found.entry(id).or_default();
                if is_added && !*was_added {
                    (*was_added, *tokens) = (true, Vec::new());
                }
                let token = shortened(token);
                if is_added == *was_added && tokens.len() < SHOWN && !tokens.contains(&token) {
                    tokens.push(token);
                }
            }
            Ok(())
        })?;
    }
    Ok(found.into_iter().map(|(id, (_, tokens))| (id, tokens.join("` and `"))).collect())
}

fn shortened(token: &str) -> String {
    match token.char_indices().nth(SHOWN_CHARACTERS) {
        Some((end, _)) => format!("{}…", &token[..end]),
        None => token.to_owned(),
    }
}

/// Takes id, whether the token was added to the model's own, and the token.
pub(super) type Sink<'a> = dyn FnMut(u64, bool, &str) -> Result<(), String> + 'a;

/// Calls `sink` for each token of a file.
pub(super) fn each_token(path: &Path, sink: &mut Sink<'_>) -> Result<()> {
    let (file, size) = open(path)?;
    let reader = BufReader::with_capacity(CHUNK, file.take(size));
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    match name {
        "vocab.txt" => lines(reader, sink),
        "vocab.json" => json(reader, Pairs { sink, is_added: false }),
        "added_tokens.json" => json(reader, Pairs { sink, is_added: true }),
        _ => json(reader, Tokenizer { sink }),
    }
    .map_err(|message| Error::checkpoint(message).file(path))
}

fn json<'de, S>(reader: impl Read, seed: S) -> Result<(), String>
where
    S: for<'a> DeserializeSeed<'a, Value = ()>,
{
    let mut deserializer = serde_json::Deserializer::from_reader(reader);
    let read = seed.deserialize(&mut deserializer).and_then(|()| deserializer.end());
    read.map_err(|error| format!("the vocabulary cannot be read: {error}"))
}

/// Reads a token a line; its number is the id.
fn lines(mut reader: impl BufRead, sink: &mut Sink<'_>) -> Result<(), String> {
    let mut line = String::new();
    for id in 0.. {
        line.clear();
        let length = reader.read_line(&mut line);
        if length.map_err(|error| format!("the vocabulary cannot be read: {error}"))? == 0 {
            break;
        }
        sink(id, false, line.trim_end_matches(['\r', '\n']))?;
    }
    Ok(())
}

/// Takes a string into a buffer, so that none is allocated for each token.
struct Into<'a>(&'a mut String);

impl<'de> DeserializeSeed<'de> for Into<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Into<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a token")
    }

    fn visit_str<E: serde::de::Error>(self, token: &str) -> Result<(), E> {
        self.0.clear();
        self.0.push_str(token);
        Ok(())
    }
}

/// A `tokenizer.json`: tokens that were added, and those of its model.
struct Tokenizer<'a, 'b> {
    sink: &'a mut Sink<'b>,
}

impl<'de> DeserializeSeed<'de> for Tokenizer<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Tokenizer<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a `model`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut key = String::new();
        while map.next_key_seed(Into(&mut key))?.is_some() {
            match key.as_str() {
                "added_tokens" => map.next_value_seed(AddedTokens { sink: self.sink })?,
                "model" => map.next_value_seed(Model { sink: self.sink })?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

struct AddedTokens<'a, 'b> {
    sink: &'a mut Sink<'b>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u64,
    content: String,
}

impl<'de> DeserializeSeed<'de> for AddedTokens<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for AddedTokens<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of tokens with their ids")
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(token) = list.next_element::<AddedToken>()? {
            (self.sink)(token.id, true, &token.content).map_err(A::Error::custom)?;
        }
        Ok(())
    }
}

struct Model<'a, 'b> {
    sink: &'a mut Sink<'b>,
}

impl<'de> DeserializeSeed<'de> for Model<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Model<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a model with its vocabulary")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut key = String::new();
        while map.next_key_seed(Into(&mut key))?.is_some() {
            if key == "vocab" {
                map.next_value_seed(Pairs { sink: self.sink, is_added: false })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

/// Tokens with their ids as a map, or in the order of their ids as a list of tokens and scores.
struct Pairs<'a, 'b> {
    sink: &'a mut Sink<'b>,
    is_added: bool,
}

impl<'de> DeserializeSeed<'de> for Pairs<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Pairs<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tokens with their ids")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut token = String::new();
        while map.next_key_seed(Into(&mut token))?.is_some() {
            let id = map.next_value()?;
            (self.sink)(id, self.is_added, &token).map_err(A::Error::custom)?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut token = String::new();
        let mut id = 0;
        while list.next_element_seed(Scored(&mut token))?.is_some() {
            (self.sink)(id, self.is_added, &token).map_err(A::Error::custom)?;
            id += 1;
        }
        Ok(())
    }
}

/// A token with its score.
struct Scored<'a>(&'a mut String);

impl<'de> DeserializeSeed<'de> for Scored<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Scored<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a token and its score")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let token = list.next_element_seed(Into(self.0))?;
        token.ok_or_else(|| A::Error::invalid_length(0, &"a token and its score"))?;
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }
}
