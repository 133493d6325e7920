//! Checking files: a merge with sinks that keep nothing. They hash what comes, or compare it with what
//! is there.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::control::Control;
use super::digest::{Digester, Digests};
use super::files::{Merges, Purpose, Told};
use super::memory::{self, MemoryPlan};
use super::simd::Simd;
use super::source::Sink;
use super::task::Tasks;
use super::{Settings, run_planned};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::{self, AlignedBuffer, InputReader, ReadPath, Spool};
use crate::kernels::{self, Level};
use crate::plan::{InputFile, Plan};

/// Bytes of a file that a worker compares at once.
const COMPARED: usize = 64 << 10;
/// What is kept of each tensor until all are hashed, at the most.
const KEPT: u64 = 192;

/// Where a tensor lies that another is compared with.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Which of the files.
    pub file: usize,
    /// Its first byte there.
    pub start: u64,
}

/// How a tensor differs from what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deviation {
    /// The first element that differs, by its flat index.
    pub first: u64,
    /// How many differ.
    pub elements: u64,
    /// Its bytes as they should be.
    pub expected: Vec<u8>,
    /// Its bytes in the file.
    pub found: Vec<u8>,
}

/// What the tensors of a plan are compared with, and what differs so far.
#[derive(Debug)]
pub(crate) struct Against {
    readers: Vec<InputReader>,
    /// Of each tensor its place; none if it is left out.
    places: Vec<Option<Place>>,
    level: Level,
    deviations: Mutex<BTreeMap<usize, Deviation>>,
}

impl Against {
    fn open(files: &[InputFile], places: Vec<Option<Place>>, level: Level) -> Result<Self> {
        let open = |file| InputReader::open(file, ReadPath::Positioned);
        let readers = files.iter().map(open).collect::<Result<_>>()?;
        Ok(Self { readers, places, level, deviations: Mutex::default() })
    }

    /// Whether tensor `tensor` is compared.
    pub(super) fn has(&self, tensor: usize) -> bool {
        self.places[tensor].is_some()
    }

    /// Compares `expected`, the elements of tensor `tensor` from `first` on.
    fn compare(&self, tensor: usize, dtype: DType, first: u64, expected: &[u8]) -> Result<()> {
        let Some(Place { file, start }) = self.places[tensor] else { return Ok(()) };
        let size = dtype.size();
        let mut there = vec![0; COMPARED.min(expected.len())];
        for (part, expected) in expected.chunks(COMPARED).enumerate() {
            let there = &mut there[..expected.len()];
            let before = first + (part * COMPARED / size) as u64;
            self.readers[file].read_into(start + before * size as u64, there)?;
            let elements = kernels::differing(self.level, size, expected, there);
            if elements > 0 {
                let each = expected.chunks(size).zip(there.chunks(size));
                let at = each.clone().take_while(|(one, other)| one == other).count();
                let (expected, found) = (expected.chunks(size), there.chunks(size));
                let bytes = |mut chunks: std::slice::Chunks<'_, u8>| {
                    chunks.nth(at).unwrap_or_default().to_vec()
                };
                let (expected, found) = (bytes(expected), bytes(found));
                let first = before + at as u64;
                self.add(tensor, Deviation { first, elements, expected, found });
            }
        }
        Ok(())
    }

    fn add(&self, tensor: usize, deviation: Deviation) {
        let mut all = self.deviations.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(tensor)
            .and_modify(|known| {
                let elements = known.elements + deviation.elements;
                if deviation.first < known.first {
                    *known = deviation.clone();
                }
                known.elements = elements;
            })
            .or_insert(deviation);
    }
}

/// Takes a tensor, and keeps nothing of it.
#[derive(Debug)]
pub(super) struct CheckingSink {
    pub(super) dtype: DType,
    pub(super) told: Option<Told>,
    /// What it is compared with, and which of the tensors it is.
    pub(super) against: Option<(Arc<Against>, usize)>,
}

impl Sink for CheckingSink {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn digester(&self) -> Option<&Digester> {
        self.told.as_ref().map(Told::digester)
    }

    fn takes_any_piece(&self) -> bool {
        true
    }

    fn write(&self, first: u64, buffer: &AlignedBuffer, bytes: Range<usize>) -> Result<()> {
        match &self.against {
            Some((against, tensor)) => {
                against.compare(*tensor, self.dtype, first, &buffer.as_slice()[bytes])
            }
            None => Ok(()),
        }
    }

    fn finish(&self) -> Result<()> {
        self.told.as_ref().map_or(Ok(()), Told::finish)
    }
}

/// The BLAKE3 hash of each tensor of `plan`, none of which is written.
pub fn hash(plan: &Plan, settings: &Settings, control: &Control) -> Result<Vec<[u8; 32]>> {
    let digests = Arc::new(Digests::new(1, plan.len()));
    let (mut tasks, needs) =
        Merges::open_to(Purpose::Checked(None), vec![plan], ReadPath::Auto, None)?;
    tasks.observe(Arc::clone(&digests) as Arc<_>);
    let baseline = memory::resident() + KEPT * plan.len() as u64;
    let memory = MemoryPlan::new(&needs, settings.memory, settings.workers, baseline, 0)?;
    run_planned(&Simd(settings.level), &tasks, settings, memory, control)?;
    io::check_unchanged(&plan.files)?;
    let known = digests.of(0);
    let hash =
        |known: &Option<_>| known.as_ref().map(|known: &super::digest::TensorDigest| known.blake3);
    let all: Option<Vec<_>> = known.iter().map(hash).collect();
    all.ok_or_else(|| Error::internal("a tensor was not hashed"))
}

/// Makes tensors of `plan`, and compares each with the bytes at its place in one of `files`; how those
/// differ that do. Tensors without a place are made only as far as numbers over the model need them.
/// Inputs that are not here come by `spool`; who fetches them may have so many bytes resident.
pub fn compare(
    plan: &Plan,
    files: &[InputFile],
    places: Vec<Option<Place>>,
    spool: Option<(Arc<Spool>, u64)>,
    settings: &Settings,
    control: &Control,
) -> Result<BTreeMap<usize, Deviation>> {
    let against = Arc::new(Against::open(files, places, settings.level)?);
    let purpose = Purpose::Checked(Some(Arc::clone(&against)));
    let (spool, beside) = spool.unzip();
    let (tasks, needs) = Merges::open_to(purpose, vec![plan], ReadPath::Auto, spool.clone())?;
    let beside = beside.unwrap_or(0) + (COMPARED * settings.workers) as u64;
    let baseline = memory::resident() + beside;
    let memory = MemoryPlan::new(&needs, settings.memory, settings.workers, baseline, 0)?;
    if let Some(spool) = spool {
        spool.begin();
    }
    run_planned(&Simd(settings.level), &tasks, settings, memory, control)?;
    io::check_unchanged(&plan.files)?;
    io::check_unchanged(files)?;
    Ok(against.deviations.lock().unwrap_or_else(PoisonError::into_inner).clone())
}

/// Whether making any tensor of `plan` takes numbers over all of them.
pub fn needs_all(plan: &Plan) -> Result<bool> {
    let (tasks, _) = Merges::open_to(Purpose::Checked(None), vec![plan], ReadPath::Auto, None)?;
    Ok(tasks.needs_sweep())
}
