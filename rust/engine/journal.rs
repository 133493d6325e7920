//! What a run has finished, written down for the next one, should this one not come to its end.
//!
//! Each output has a journal in its directory. The first record is the *key*: all that decides the
//! bytes, by which the caller knows whether the journal is of the same merge. Those behind it tell of
//! tensors that are finished, each with the hash of its bytes, and of numbers that were found on the
//! way to what is reduced over the whole model. A record is written when the bytes that it tells of are
//! on the disk: some seconds' worth at a time, since waiting for the disk is what costs. A run that is
//! over sooner has no journal.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::digest::TensorDigest;
use super::files::partial_name;
use crate::error::{Error, Result};
use crate::io::{JournalFile, OutputFolder, damaged};
use crate::kernels::Comparison;
use crate::plan::Plan;

/// How long something that is finished waits until it is written down.
pub const JOURNAL_EVERY: Duration = Duration::from_secs(2);
/// Tensors that a record tells of at the most.
const MOST_IN_RECORD: usize = 4096;
/// Tasks with numbers, of which each may have many.
const MOST_WITH_NUMBERS: usize = 64;
/// What one of them takes there at the most: digests, their hexadecimal forms, and the text.
const RECORD_BYTES: u64 = 1024;

/// The name of a journal.
pub fn journal_name() -> String {
    partial_name("oxmerge_resume")
}

/// The key of the journal in `folder`, if there is one.
pub fn journal_key(folder: &OutputFolder) -> Result<Option<String>> {
    let mut key = None;
    JournalFile::open(folder, &journal_name(), |record| {
        key.get_or_insert_with(|| record.to_owned());
        Ok(())
    })?;
    Ok(key)
}

/// The journals of outputs that are made together.
#[derive(Clone, Copy, Debug)]
pub struct Journals<'a> {
    /// One for each output.
    pub keys: &'a [&'a str],
    /// How long something finished waits.
    pub every: Duration,
}

/// A record behind the key.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
enum Record {
    /// Tensors that are finished.
    Tensors(Vec<Finished>),
    /// The number of each tensor, and the bits of what was found.
    Numbers(Vec<(usize, Vec<u64>)>),
}

impl Record {
    fn text(&self) -> Result<String> {
        serde_json::to_string(self)
            .map_err(|_| Error::internal("a record of the journal cannot be written"))
    }
}

/// The number of a tensor in the plan, its hash in hexadecimal, and its statistics: counts, and the bits
/// of sums.
#[derive(Serialize, Deserialize)]
struct Finished(usize, String, Option<([u64; 5], [u64; 2])>);

impl Finished {
    fn new(index: usize, digest: &TensorDigest) -> Self {
        let statistics = digest.statistics.map(|found| {
            let Comparison { nan, infinite, saturated, compared, changed, difference, norm } =
                found;
            let counts = [nan, infinite, saturated, compared, changed];
            (counts, [difference.to_bits(), norm.to_bits()])
        });
        Self(index, blake3::Hash::from(digest.blake3).to_hex().to_string(), statistics)
    }

    fn digest(&self) -> Option<TensorDigest> {
        let blake3 = *blake3::Hash::from_hex(&self.1).ok()?.as_bytes();
        let statistics = self.2.map(|(counts, sums)| {
            let [nan, infinite, saturated, compared, changed] = counts;
            let [difference, norm] = sums.map(f64::from_bits);
            Comparison { nan, infinite, saturated, compared, changed, difference, norm }
        });
        Some(TensorDigest { blake3, statistics })
    }
}

/// What earlier runs have written down of one output.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    pub(crate) tensors: BTreeMap<usize, TensorDigest>,
    pub(crate) numbers: BTreeMap<usize, Vec<f64>>,
}

/// The journals of outputs that are made together.
#[derive(Debug)]
pub(crate) struct Journal<'a> {
    /// The directory of each output, and its key.
    outputs: Vec<(&'a OutputFolder, &'a str)>,
    /// Each is created with its first record.
    files: Mutex<Vec<Option<JournalFile>>>,
    waiting: Mutex<Waiting>,
    changed: Condvar,
    every: Duration,
}

/// Bytes that journals of so many tensors take: a record and its text, and what waits to be written.
pub fn bytes(tensors: usize) -> u64 {
    let in_record = tensors.min(MOST_IN_RECORD) as u64;
    in_record * RECORD_BYTES + 2 * (size_of::<usize>() * tensors) as u64
}

/// What is finished and not yet written down.
#[derive(Debug, Default)]
struct Waiting {
    tensors: Vec<usize>,
    numbers: Vec<(usize, Vec<f64>)>,
    since: Option<Instant>,
    is_over: bool,
}

impl Waiting {
    fn is_due(&self, every: Duration) -> bool {
        self.since.is_some_and(|since| since.elapsed() >= every)
    }
}

impl<'a> Journal<'a> {
    /// Opens the journals of the outputs in `folders`, each of which has a key and `tensors` tensors;
    /// also what earlier runs have written there.
    pub(crate) fn open(
        outputs: impl Iterator<Item = (&'a OutputFolder, &'a str)>,
        tensors: usize,
        every: Duration,
    ) -> Result<(Self, Vec<Kept>)> {
        let outputs: Vec<_> = outputs.collect();
        let (mut files, mut all) = (Vec::new(), Vec::new());
        for &(folder, key) in &outputs {
            let mut kept = Kept::default();
            let mut is_first = true;
            let file = JournalFile::open(folder, &journal_name(), |record| {
                if std::mem::take(&mut is_first) {
                    let is_same = record == key;
                    return if is_same { Ok(()) } else { Err(damaged().found("another merge")) };
                }
                kept.read(record, tensors)
            })?;
            files.push(file);
            all.push(kept);
        }
        let (waiting, changed) = (Mutex::default(), Condvar::new());
        Ok((Self { outputs, files: Mutex::new(files), waiting, changed, every }, all))
    }

    /// Whether there is a journal of an earlier run for each output.
    pub(crate) fn is_begun(&self) -> bool {
        lock(&self.files).iter().all(Option::is_some)
    }

    /// Takes down that a tensor is finished in all outputs.
    pub(crate) fn tensor(&self, index: usize) {
        self.wait_for_disk(|waiting| waiting.tensors.push(index));
    }

    /// Takes down what was found for a tensor.
    pub(crate) fn numbers(&self, index: usize, numbers: &[f64]) {
        self.wait_for_disk(|waiting| waiting.numbers.push((index, numbers.to_vec())));
    }

    fn wait_for_disk(&self, put: impl FnOnce(&mut Waiting)) {
        let mut waiting = lock(&self.waiting);
        put(&mut waiting);
        waiting.since.get_or_insert_with(Instant::now);
    }

    /// Writes down what is finished, now and then, until [`end`](Self::end) is called. `flush` brings
    /// the bytes of tensors to the disk, and tells what is known of them, for each output.
    pub(crate) fn keep_writing(&self, flush: &Flush<'_>) -> Result<()> {
        loop {
            let mut waiting = lock(&self.waiting);
            while !waiting.is_over && !waiting.is_due(self.every) {
                let left = waiting
                    .since
                    .map_or(self.every, |since| self.every.saturating_sub(since.elapsed()));
                let left = left.max(Duration::from_millis(1));
                let woken = self.changed.wait_timeout(waiting, left);
                waiting = woken.unwrap_or_else(PoisonError::into_inner).0;
            }
            if waiting.is_over {
                return Ok(());
            }
            drop(waiting);
            self.write(flush)?;
        }
    }

    /// Whether something has waited for so long that it is to be written down.
    pub(crate) fn is_due(&self) -> bool {
        lock(&self.waiting).is_due(self.every)
    }

    /// Ends `keep_writing`.
    pub(crate) fn end(&self) {
        lock(&self.waiting).is_over = true;
        self.changed.notify_all();
    }

    /// Writes down what is finished.
    pub(crate) fn write(&self, flush: &Flush<'_>) -> Result<()> {
        let Waiting { tensors, numbers, .. } = {
            let mut waiting = lock(&self.waiting);
            let is_over = waiting.is_over;
            std::mem::replace(&mut *waiting, Waiting { is_over, ..Waiting::default() })
        };
        let mut files = lock(&self.files);
        for tensors in tensors.chunks(MOST_IN_RECORD) {
            let digests = flush(tensors)?;
            for (at, digests) in digests.iter().enumerate() {
                let each = tensors.iter().zip(digests);
                let each = each.map(|(&index, digest)| Finished::new(index, digest));
                self.append(&mut files, at, &Record::Tensors(each.collect()))?;
            }
        }
        for numbers in numbers.chunks(MOST_WITH_NUMBERS) {
            let bits = |(index, found): &(usize, Vec<f64>)| (*index, to_bits(found));
            // They are of all outputs together, so the first stands for all.
            self.append(&mut files, 0, &Record::Numbers(numbers.iter().map(bits).collect()))?;
        }
        Ok(())
    }

    fn append(&self, files: &mut [Option<JournalFile>], at: usize, record: &Record) -> Result<()> {
        let text = record.text()?;
        let (folder, key) = self.outputs[at];
        let file = if let Some(file) = files[at].take() {
            file
        } else {
            folder.remove(&journal_name())?; // one without a whole record
            JournalFile::create(folder, &journal_name(), key)?
        };
        files[at].insert(file).append(&text)
    }
}

/// See [`Journal::keep_writing`].
pub(crate) type Flush<'a> = dyn Fn(&[usize]) -> Result<Vec<Vec<TensorDigest>>> + Sync + 'a;

impl Kept {
    /// Takes over a record of a journal of so many tensors. Later records count.
    fn read(&mut self, record: &str, tensors: usize) -> Result<()> {
        let is_known = |index: usize| if index < tensors { Ok(()) } else { Err(damaged()) };
        match serde_json::from_str(record).map_err(|_| damaged())? {
            Record::Tensors(found) => {
                for finished in found {
                    is_known(finished.0)?;
                    self.tensors.insert(finished.0, finished.digest().ok_or_else(damaged)?);
                }
            }
            Record::Numbers(found) => {
                for (index, bits) in found {
                    is_known(index)?;
                    self.numbers.insert(index, bits.into_iter().map(f64::from_bits).collect());
                }
            }
        }
        Ok(())
    }
}

/// Writes what a sweep has found for tensors to the file `name` in `folder`: there is none until it is
/// whole.
pub(crate) fn write_numbers(
    folder: &OutputFolder,
    name: &str,
    key: &str,
    numbers: &BTreeMap<usize, Vec<f64>>,
) -> Result<()> {
    let unfinished = partial_name(name);
    folder.remove(&unfinished)?;
    let mut file = JournalFile::create(folder, &unfinished, key)?;
    let numbers: Vec<_> = numbers.iter().map(|(&index, found)| (index, to_bits(found))).collect();
    for numbers in numbers.chunks(MOST_WITH_NUMBERS) {
        file.append(&Record::Numbers(numbers.to_vec()).text()?)?;
    }
    file.append(&Record::Numbers(Vec::new()).text()?)?;
    folder.rename(&unfinished, name)
}

/// What a sweep of so many tensors has found, if there is a file of [`write_numbers`].
pub(crate) fn read_numbers(
    folder: &OutputFolder,
    name: &str,
    key: &str,
    tensors: usize,
) -> Result<Option<BTreeMap<usize, Vec<f64>>>> {
    let (mut kept, mut is_first, mut is_whole) = (Kept::default(), true, false);
    let file = JournalFile::open(folder, name, |record| {
        if std::mem::take(&mut is_first) {
            return if record == key { Ok(()) } else { Err(damaged().found("another merge")) };
        }
        is_whole = record == Record::Numbers(Vec::new()).text()?;
        kept.read(record, tensors)
    })?;
    match file {
        Some(_) if !is_whole => Err(damaged().file(folder.path_of(name))),
        file => Ok(file.map(|_| kept.numbers)),
    }
}

/// What the journals in `folders`, of parts of one plan, say of its tensors: something of each of
/// them.
pub fn read_digests(
    folders: &[OutputFolder],
    key: &str,
    plan: &Plan,
) -> Result<Vec<Option<TensorDigest>>> {
    let mut digests = vec![None; plan.len()];
    for folder in folders {
        let (_, kept) = Journal::open([(folder, key)].into_iter(), plan.len(), JOURNAL_EVERY)?;
        for (index, digest) in kept.into_iter().flat_map(|kept| kept.tensors) {
            digests[index] = Some(digest);
        }
    }
    match digests.iter().position(Option::is_none) {
        Some(unknown) => Err(damaged().tensor(plan.tensor(unknown).name())),
        None => Ok(digests),
    }
}

fn to_bits(found: &[f64]) -> Vec<u64> {
    found.iter().map(|number| number.to_bits()).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
