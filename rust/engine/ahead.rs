//! Outputs that are computed before it is known what selections keep, so that inputs are read once.
//!
//! A sample says between which two cuts that of a selection lies. So all elements but some hundredths
//! are decided when they are first seen. The pass that counts computes the outputs too, as if the first
//! of the two were the cut, and holds them in memory, with the inputs of what lies between. When
//! the cuts are known, the program of the combine runs over those few as over a small tensor, its results
//! are put in their places, and the output is written.
//!
//! A digest compares the output with an input. Where nothing of a block is undecided, that is done while
//! both are in the cache, and else when all is decided, for which the input is read once more. Models near
//! their base have few distinct differences: a cut there is the index of the last of many equal ones,
//! so what is undecided lies together, and most blocks have none of it.
//!
//! No byte depends on it. What there is no room for is left to the combine, which reads again: a unit
//! that finds no room, one in which too much is undecided, and all of a tensor of which a cut lies
//! elsewhere than a sample said.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::backend::Step;
use super::digest::{AT_ONCE, Node};
use super::passes::References;
use super::task::Task;
use crate::dtype::DType;
use crate::error::Result;
use crate::formula::compile::Staged;
use crate::formula::machine::{InputBytes, Known};
use crate::formula::selection::sampled_runs;
use crate::formula::stage;
use crate::formula::{Chosen, Value};
use crate::io::{AlignedBuffer, PAGE};

/// One in so many elements of a unit may be undecided.
const UNDECIDED: u64 = 8;

/// Whether outputs of `values` over so many elements can be computed ahead, and that takes less than it
/// saves: `outputs` are bytes an element, and so are those of `inputs` that would be copied again.
pub(crate) fn suits(values: &[Value], elements: u64, outputs: u64, inputs: u64) -> bool {
    outputs <= inputs && sampled_runs(elements) > 0 && stage::waits_for_cuts_alone(values)
}

/// Bytes of a buffer for `elements` of an output, `size` bytes each.
fn out_bytes(elements: u64, size: u64) -> usize {
    (elements * size) as usize + PAGE
}

/// Bytes of `elements` that are held, of which so many are undecided. Outputs have these bytes an
/// element, and all inputs together.
pub(super) fn held_bytes(outputs: &[u64], inputs: u64, elements: u64, undecided: u64) -> u64 {
    let out = |&size: &u64| AlignedBuffer::resident(out_bytes(elements, size)) as u64;
    let index = size_of::<u32>() as u64;
    let of_block = size_of::<Digested>() + size_of::<Option<Node>>() * outputs.len();
    let digested = (blocks(elements) * of_block) as u64;
    outputs.iter().map(out).sum::<u64>() + undecided * (index + inputs) + digested
}

/// How many blocks so many elements are that are digested at once.
fn blocks(elements: u64) -> usize {
    elements.div_ceil(AT_ONCE) as usize
}

/// How many of `elements` may be undecided.
pub(super) fn most_undecided(elements: u64) -> u64 {
    elements / UNDECIDED
}

/// The memory that held units of all tensors may take.
#[derive(Debug)]
pub(crate) struct HeldRoom(Mutex<Spare>);

#[derive(Debug)]
struct Spare {
    bytes: u64,
    /// Buffers of units that were written: the next ones need not be cleared. What they take is not
    /// among `bytes`.
    outs: Vec<AlignedBuffer>,
}

impl HeldRoom {
    pub(crate) fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Spare { bytes, outs: Vec::new() })))
    }

    fn lock(&self) -> MutexGuard<'_, Spare> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `bytes`, if there are so many, and buffers of `outs` bytes, which are among them.
    fn take(&self, bytes: u64, outs: &[usize]) -> Option<Vec<AlignedBuffer>> {
        let mut spare = self.lock();
        let all = spare.outs.iter().map(resident).sum::<u64>() + spare.bytes;
        if all < bytes {
            return None; // and the buffers stay for those that need less
        }
        let fitting = |&size: &usize| {
            let at = spare.outs.iter().position(|out| out.capacity() == size);
            let out = at.map(|at| spare.outs.swap_remove(at)).unwrap_or_default();
            spare.bytes += resident(&out);
            out
        };
        let found = outs.iter().map(fitting).collect();
        while spare.bytes < bytes
            && let Some(out) = spare.outs.pop()
        {
            spare.bytes += resident(&out);
        }
        spare.bytes -= bytes;
        Some(found)
    }
}

fn resident(out: &AlignedBuffer) -> u64 {
    AlignedBuffer::resident(out.capacity()) as u64
}

/// How a pass that counts computes the outputs too.
#[derive(Debug)]
pub(crate) struct Ahead {
    /// Counts, stores the outputs, and marks what is undecided, as one more output.
    pub(super) code: Staged,
    /// What each selection keeps for certain, and then what each may keep.
    pub(super) known: Arc<Known>,
    /// What the outputs are compared with.
    pub(super) references: References,
    pub(super) room: Arc<HeldRoom>,
}

impl Ahead {
    /// Memory for the outputs of `elements`, if there is room.
    pub(super) fn hold(&self, task: &Task, elements: &Range<u64>) -> Result<Option<Held>> {
        let count = elements.end - elements.start;
        let outputs: Vec<u64> = task.sinks.iter().map(|sink| sink.dtype().size() as u64).collect();
        let inputs = self.code.inputs.iter().map(|&index| (index, task.sources[index].dtype()));
        let width = inputs.clone().map(|(_, dtype)| dtype.size() as u64).sum();
        let most = most_undecided(count);
        let bytes = held_bytes(&outputs, width, count, most);
        let sizes: Vec<usize> = outputs.iter().map(|&size| out_bytes(count, size)).collect();
        let Some(mut outs) = self.room.take(bytes, &sizes) else { return Ok(None) };
        for (out, size) in outs.iter_mut().zip(sizes) {
            out.grow(size)?;
        }
        let most = most as usize;
        let input = |(index, dtype): (usize, DType)| {
            (index, dtype, Vec::with_capacity(most * dtype.size()))
        };
        let (inputs, undecided) = (inputs.map(input).collect(), Vec::with_capacity(most));
        let digested = Vec::with_capacity(blocks(count));
        let (first, room) = (elements.start, Arc::clone(&self.room));
        Ok(Some(Held { outs, first, undecided, inputs, digested, room, bytes }))
    }
}

/// Where a block begins in which nothing is undecided, and what is known of each output there.
pub(super) type Digested = (u64, Vec<Option<Node>>);

/// A unit of the outputs, with what is undecided in it.
#[derive(Debug)]
pub(crate) struct Held {
    /// The outputs, as they will be handed to the sinks.
    pub(super) outs: Vec<AlignedBuffer>,
    /// The unit's first element.
    first: u64,
    /// Which elements are undecided, in order, counted from the first.
    undecided: Vec<u32>,
    /// Their bytes in each input that is read.
    inputs: Vec<(usize, DType, Vec<u8>)>,
    pub(super) digested: Vec<Digested>,
    /// What it takes so many bytes of.
    room: Arc<HeldRoom>,
    bytes: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut spare = self.room.lock();
        let outs: u64 = self.outs.iter().map(resident).sum();
        spare.bytes += self.bytes.saturating_sub(outs);
        spare.outs.append(&mut self.outs);
    }
}

impl Held {
    /// Keeps the inputs of the elements of a step whose `marks` are 1. False if they are too many.
    pub(super) fn gather(&mut self, step: &Step<'_>, marks: &[u8]) -> bool {
        let before = self.undecided.len();
        let count: usize = marks.chunks(255).map(|marks| marks.iter().sum::<u8>() as usize).sum();
        if before + count > self.undecided.capacity() {
            return false;
        }
        let start = (step.elements.start - self.first) as u32;
        let (words, rest) = marks.as_chunks();
        for (at, word) in (start..).step_by(size_of::<u64>()).zip(words) {
            let mut word = u64::from_le_bytes(*word);
            while word != 0 {
                self.undecided.push(at + word.trailing_zeros() / u8::BITS);
                word &= word - 1;
            }
        }
        let behind = start + (marks.len() - rest.len()) as u32;
        let rest = (behind..).zip(rest).filter(|(_, mark)| **mark != 0);
        self.undecided.extend(rest.map(|(at, _)| at));
        for (index, dtype, bytes) in &mut self.inputs {
            let Some(input) = step.inputs[*index] else { continue };
            let input = input.part(&step.elements);
            let found = self.undecided[before..].iter().map(|at| (at - start) as usize);
            match dtype.size() {
                1 => gather::<1>(input, found, bytes),
                2 => gather::<2>(input, found, bytes),
                4 => gather::<4>(input, found, bytes),
                _ => gather::<8>(input, found, bytes),
            }
        }
        true
    }

    /// Gives back the room that is not used.
    pub(super) fn shrink(&mut self) {
        self.undecided.shrink_to_fit();
        let mut bytes = (self.undecided.len() * size_of::<u32>()) as u64;
        for (_, _, input) in &mut self.inputs {
            input.shrink_to_fit();
            bytes += input.len() as u64;
        }
        let of_block = |(_, nodes): &Digested| size_of::<Digested>() + size_of_val(&nodes[..]);
        self.digested.shrink_to_fit();
        bytes += self.digested.iter().map(of_block).sum::<usize>() as u64;
        bytes += self.outs.iter().map(resident).sum::<u64>();
        self.room.lock().bytes += self.bytes.saturating_sub(bytes);
        self.bytes = self.bytes.min(bytes);
    }

    /// How many elements are undecided.
    pub(super) fn undecided(&self) -> u64 {
        self.undecided.len() as u64
    }

    /// What is `known`, for the undecided elements as a tensor of their own.
    pub(super) fn among(&self, known: &Known) -> Known {
        let among = |&Chosen { threshold, equals_end }: &Chosen| {
            let is_before = |at: &u32| self.first + u64::from(*at) < equals_end;
            Chosen { threshold, equals_end: self.undecided.partition_point(is_before) as u64 }
        };
        Known { chosen: known.chosen.iter().map(among).collect(), ..Known::default() }
    }

    /// The bytes of the undecided elements, of each of `count` inputs.
    pub(super) fn inputs(&self, count: usize) -> Vec<Option<InputBytes<'_>>> {
        let mut all = vec![None; count];
        for (index, dtype, bytes) in &self.inputs {
            all[*index] = Some(InputBytes { dtype: *dtype, first: 0, bytes });
        }
        all
    }

    /// Puts what became of the undecided elements in their places in an output of this type.
    pub(super) fn put(&self, dtype: DType, decided: &[u8], out: &mut [u8]) {
        match dtype.size() {
            1 => scatter::<1>(decided, &self.undecided, out),
            2 => scatter::<2>(decided, &self.undecided, out),
            4 => scatter::<4>(decided, &self.undecided, out),
            _ => scatter::<8>(decided, &self.undecided, out),
        }
    }
}

fn gather<const SIZE: usize>(
    input: &[u8],
    found: impl ExactSizeIterator<Item = usize>,
    bytes: &mut Vec<u8>,
) {
    let (input, _) = input.as_chunks::<SIZE>();
    let before = bytes.len();
    bytes.resize(before + found.len() * SIZE, 0);
    let (out, _) = bytes[before..].as_chunks_mut::<SIZE>();
    out.iter_mut().zip(found).for_each(|(out, at)| *out = input[at]);
}

fn scatter<const SIZE: usize>(decided: &[u8], places: &[u32], out: &mut [u8]) {
    let ((out, _), (decided, _)) = (out.as_chunks_mut::<SIZE>(), decided.as_chunks::<SIZE>());
    places.iter().zip(decided).for_each(|(&at, element)| out[at as usize] = *element);
}
