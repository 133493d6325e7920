//! Going on where an earlier run was interrupted: which of its tensors hold, and what of this run is
//! written down for the next one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::control::Control;
use super::digest::{Digests, Observer, TensorDigest};
use super::files::{Merges, partial_name};
use super::journal::{Journal, Journals, Kept};
use super::task::Tasks;
use crate::error::{Error, Result};
use crate::io::{self, OutputFolder};

/// Bytes that a thread reads at once to check a tensor.
const AT_ONCE: usize = 1 << 20;

/// What an earlier run has done, and what this one does.
#[derive(Debug)]
pub(super) struct Resumed<'a> {
    pub(super) journal: Journal<'a>,
    digests: Arc<Digests>,
    pub(super) folders: Vec<&'a OutputFolder>,
    /// Of each task, whether all of its outputs are kept.
    pub(super) is_done: Vec<bool>,
    /// What was found for tasks, by their numbers.
    pub(super) numbers: BTreeMap<usize, Vec<f64>>,
    /// For each output, which shards have a tensor that the journal tells of.
    vouched: Vec<Vec<AtomicBool>>,
}

impl<'a> Merges<'a> {
    /// Opens the journals of the outputs in `folders`. What they tell of is read
    /// again and hashed, by so many threads; what does not hold is to be made again.
    pub fn resume(
        &mut self,
        folders: &[&'a OutputFolder],
        Journals { keys, every }: Journals<'a>,
        digests: &Arc<Digests>,
        threads: usize,
        control: &Control,
    ) -> Result<()> {
        let outputs = folders.iter().copied().zip(keys.iter().copied());
        let (journal, mut kept) = Journal::open(outputs, self.len(), every)?;
        let numbers = kept.first_mut().map(|kept| std::mem::take(&mut kept.numbers));
        let is_done = self.check(folders, &kept, threads, control)?;
        let shards = self
            .plans
            .iter()
            .map(|plan| plan.shards.iter().map(|_| AtomicBool::new(false)).collect());
        let resumed = Resumed {
            journal,
            digests: Arc::clone(digests),
            folders: folders.to_vec(),
            is_done,
            numbers: numbers.unwrap_or_default(),
            vouched: shards.collect(),
        };
        for index in (0..self.len()).filter(|&index| resumed.is_done[index]) {
            resumed.vouch(self, index);
            self.are_read(index..index + 1, false);
            for (merge, kept) in kept.iter().enumerate() {
                digests.finished(merge, index, kept.tensors[&index])?;
            }
            let bytes = self.plans.iter().map(|plan| plan.tensor(index).bytes()).sum();
            control.keep(1, bytes);
        }
        if self.needs_sweep() {
            resumed.numbers.keys().for_each(|&index| self.are_read(index..index + 1, true));
        }
        self.resumed = Some(resumed);
        Ok(())
    }

    /// Which tasks' outputs are all in the files as the journals say.
    fn check(
        &self,
        folders: &[&OutputFolder],
        kept: &[Kept],
        threads: usize,
        control: &Control,
    ) -> Result<Vec<bool>> {
        let told = |index: &usize| kept.iter().all(|kept| kept.tensors.contains_key(index));
        let told: Vec<usize> = (0..self.len()).filter(told).collect();
        if told.is_empty() {
            return Ok(vec![false; self.len()]);
        }
        let files = self.open_shards(folders)?;
        let holds = |index: usize, buffer: &mut [u8]| {
            let mut outputs = self.plans.iter().zip(&files).zip(kept);
            outputs.all(|((plan, files), kept)| {
                let tensor = plan.tensor(index);
                let Some(file) = &files[tensor.shard()] else { return false };
                // What cannot be read is made again.
                let found = hash(file, tensor.start(), tensor.bytes(), buffer, control);
                found.is_ok_and(|found| kept.tensors[&index].blake3 == found)
            })
        };
        let is_done = Mutex::new(vec![false; self.len()]);
        let next = AtomicUsize::new(0);
        let work = || {
            let mut buffer = vec![0; AT_ONCE];
            while let Some(&index) = told.get(next.fetch_add(1, Ordering::Relaxed)) {
                if control.is_cancelled() {
                    break;
                }
                control.begin_tensor(self.plans[0].tensor(index).name());
                if holds(index, &mut buffer) {
                    is_done.lock().unwrap_or_else(PoisonError::into_inner)[index] = true;
                }
            }
        };
        let cores = thread::available_parallelism().map_or(1, usize::from);
        thread::scope(|scope| {
            for _ in 1..threads.min(cores).min(told.len()) {
                if thread::Builder::new().spawn_scoped(scope, work).is_err() {
                    break;
                }
            }
            work();
        });
        control.check()?;
        Ok(is_done.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// The shards that an earlier run has left of each output.
    pub(super) fn open_shards(&self, folders: &[&OutputFolder]) -> Result<Vec<Vec<Option<File>>>> {
        let open = |(plan, folder): (&&crate::plan::Plan, &&OutputFolder)| {
            let names = plan.shards.iter().map(|shard| partial_name(&shard.file_name));
            names.map(|name| folder.open_to_read(&name)).collect()
        };
        self.plans.iter().zip(folders).map(open).collect()
    }

    /// Calls `run`, and writes down meanwhile what it finishes. After a failure all that is finished is
    /// written down, and shards with nothing of it are removed.
    pub fn journaled<R>(&self, control: &Control, run: impl FnOnce() -> Result<R>) -> Result<R> {
        let Some(resumed) = &self.resumed else { return run() };
        let flush = |tensors: &[usize]| self.flush(resumed, tensors);
        let outcome = thread::scope(|scope| {
            let write = || resumed.journal.keep_writing(&flush).inspect_err(|_| control.cancel());
            // Where there is no thread to be had, all is written at the end.
            let writer = thread::Builder::new().spawn_scoped(scope, write);
            let outcome = {
                let _ends = EndsWriting(&resumed.journal);
                run()
            };
            let written = writer.map_or(Ok(()), |writer| {
                writer.join().unwrap_or_else(|_| Err(Error::internal("the journal panicked")))
            });
            // A run that was stopped since the journal failed says so.
            written.and(outcome)
        });
        // The failure that ended the run is the one to report.
        if outcome.is_ok() && self.part.is_some() {
            // Who finishes the output learns from the journal what this run has made.
            return resumed.journal.write(&flush).and(outcome);
        }
        if outcome.is_err() || resumed.journal.is_begun() || resumed.journal.is_due() {
            let _ = resumed.journal.write(&flush);
        }
        if outcome.is_err() {
            self.remove_unvouched();
        }
        outcome
    }

    /// Removes the shards of which no journal tells anything.
    pub fn remove_unvouched(&self) {
        let Some(resumed) = &self.resumed else { return };
        let outputs = self.plans.iter().zip(&resumed.folders).zip(&resumed.vouched);
        for ((plan, folder), vouched) in outputs {
            let unvouched = plan.shards.iter().zip(vouched);
            for (shard, _) in unvouched.filter(|(_, vouched)| !vouched.load(Ordering::Relaxed)) {
                let _ = folder.remove(&partial_name(&shard.file_name));
            }
        }
    }

    /// Brings the bytes of tensors to the disk; what is known of them, for each output.
    fn flush(&self, resumed: &Resumed<'_>, tensors: &[usize]) -> Result<Vec<Vec<TensorDigest>>> {
        let mut all = Vec::new();
        for (merge, (plan, shards)) in self.plans.iter().zip(&self.shards).enumerate() {
            let touched: BTreeSet<usize> =
                tensors.iter().map(|&index| plan.tensor(index).shard()).collect();
            let mut touched = touched.into_iter().filter_map(|shard| shards[shard].as_ref());
            touched.try_for_each(|shard| shard.flush())?;
            let digests = resumed.digests.of(merge);
            let known = tensors.iter().map(|&index| digests[index]).collect::<Option<_>>();
            all.push(known.ok_or_else(|| Error::internal("a finished tensor has no digest"))?);
        }
        for &index in tensors {
            resumed.vouch(self, index);
        }
        Ok(all)
    }
}

/// Ends the writing of a journal when it goes, also in a panic: who writes would be waited for.
struct EndsWriting<'a, 'b>(&'a Journal<'b>);

impl Drop for EndsWriting<'_, '_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Resumed<'_> {
    /// Takes down that a tensor stays, and so the shards that it is in.
    fn vouch(&self, merges: &Merges<'_>, index: usize) {
        for (plan, vouched) in merges.plans.iter().zip(&self.vouched) {
            vouched[plan.tensor(index).shard()].store(true, Ordering::Relaxed);
        }
    }
}

/// The hash of some bytes of a file, read through `buffer`.
fn hash(
    file: &File,
    start: u64,
    bytes: u64,
    buffer: &mut [u8],
    control: &Control,
) -> Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut done = 0;
    while done < bytes {
        control.check()?;
        let length = (bytes - done).min(buffer.len() as u64) as usize;
        let part = &mut buffer[..length];
        io::read_exact_at(file, start + done, part)?;
        hasher.update(part);
        done += length as u64;
    }
    Ok(hasher.finalize().into())
}
