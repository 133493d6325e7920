//! Sources and sinks that are byte ranges of files, and the tasks of a plan over them.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::adapted::{Desks, adapted, task_number};
use super::backend::steps;
use super::control::Control;
use super::digest::{Digester, Observer};
use super::need::{Need, SMALL};
use super::part::Part;
use super::resume::Resumed;
use super::rows::RowsSource;
use super::source::{Memory, Sink, Source};
use super::strided::StridedSource;
use super::task::{Gathered, Prepared, Task, Tasks, Work};
use super::verifying::{Against, CheckingSink};
use crate::checkpoint::put_header;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::formula::machine::TensorFrame;
use crate::io::{
    self, AlignedBuffer, DirectMode, InputReader, Needs, OutputFolder, ReadPath, ShardWriter, Spool,
};
use crate::kernels::{BLOCK, CELL, Level, compare};
use crate::methods::measures::Measure;
use crate::plan::{self, Adapted, InputFile, OutputShard, Plan, Remote, Settings, Tensor};

/// A tensor in an input file.
#[derive(Debug)]
struct FileSource {
    reader: Arc<InputReader>,
    dtype: DType,
    start: u64,
    sharing: Sharing,
}

/// Whether other sources of a task read the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sharing {
    Alone,
    /// Others come later.
    First,
    /// Others came before.
    Again,
}

impl FileSource {
    fn bytes(&self, elements: &Range<u64>) -> (u64, usize) {
        let size = self.dtype.size() as u64;
        let start = self.start + elements.start * size;
        (start, ((elements.end - elements.start) * size) as usize)
    }
}

impl Source for FileSource {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn is_in_place(&self) -> bool {
        self.reader.is_mapped()
    }

    fn stored_bytes(&self, elements: u64) -> u64 {
        if self.sharing == Sharing::Again { 0 } else { elements * self.dtype.size() as u64 }
    }

    fn is_far(&self, elements: Range<u64>) -> bool {
        let (start, length) = self.bytes(&elements);
        !self.reader.is_cached(start, length)
    }

    fn read_once<'a>(
        &'a self,
        elements: Range<u64>,
        scratch: &'a mut AlignedBuffer,
    ) -> Result<&'a [u8]> {
        let (start, length) = self.bytes(&elements);
        if self.sharing == Sharing::Alone {
            self.reader.read_direct(start, length, scratch)
        } else {
            self.reader.read(start, length, scratch)
        }
    }

    fn prefetch(&self, elements: Range<u64>) {
        let (start, length) = self.bytes(&elements);
        self.reader.prefetch(start, length);
    }

    fn read<'a>(
        &'a self,
        elements: Range<u64>,
        scratch: &'a mut AlignedBuffer,
    ) -> Result<&'a [u8]> {
        let (start, length) = self.bytes(&elements);
        self.reader.read(start, length, scratch)
    }

    fn release(&self, elements: Range<u64>) {
        let (start, length) = self.bytes(&elements);
        self.reader.release(start, length);
    }
}

/// An input file.
#[derive(Clone, Debug)]
enum Input {
    Here(Arc<InputReader>),
    /// One that is not here: what is read of it comes by a spool, which knows it by its number among
    /// the files of the plan.
    Spooled(Arc<Spool>, u32),
    /// One that can be planned with, but not read.
    Elsewhere(Remote),
}

impl Input {
    /// Reads the bytes from `start` on that fill `memory`.
    fn read_into(&self, start: u64, memory: &mut [u8]) -> Result<()> {
        match self {
            Self::Here(reader) => reader.read_into(start, memory),
            Self::Spooled(spool, file) => spool.read(*file, start, memory),
            Self::Elsewhere(remote) => Err(not_here(remote)),
        }
    }
}

/// A tensor in a file that is not here.
#[derive(Debug)]
struct RemoteSource {
    input: Input,
    dtype: DType,
    start: u64,
}

impl Source for RemoteSource {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn read<'a>(
        &'a self,
        elements: Range<u64>,
        scratch: &'a mut AlignedBuffer,
    ) -> Result<&'a [u8]> {
        let size = self.dtype.size() as u64;
        let length = ((elements.end - elements.start) * size) as usize;
        scratch.grow(length)?;
        let piece = &mut scratch.as_mut_slice()[..length];
        self.input.read_into(self.start + elements.start * size, piece)?;
        Ok(piece)
    }
}

/// An output shard; it is flushed when its last tensor is finished.
#[derive(Debug)]
pub(super) struct Shard {
    writer: ShardWriter,
    unfinished: AtomicUsize,
    /// Which file it is, and how it was left.
    finished: OnceLock<InputFile>,
}

/// A tensor in an output shard.
#[derive(Debug)]
struct FileSink {
    shard: Arc<Shard>,
    dtype: DType,
    start: u64,
    told: Option<Told>,
}

/// What is told of an output tensor to who observes the run.
#[derive(Debug)]
pub(super) struct Told {
    digester: Digester,
    observer: Arc<dyn Observer>,
    merge: usize,
    tensor: usize,
}

impl Told {
    pub(super) fn digester(&self) -> &Digester {
        &self.digester
    }

    pub(super) fn finish(&self) -> Result<()> {
        self.observer.finished(self.merge, self.tensor, self.digester.finish()?)
    }
}

impl FileSink {
    fn place(&self, first: u64) -> u64 {
        self.start + first * self.dtype.size() as u64
    }
}

impl Sink for FileSink {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn digester(&self) -> Option<&Digester> {
        self.told.as_ref().map(|told| &told.digester)
    }

    fn takes_any_piece(&self) -> bool {
        true
    }

    fn buffer_offset(&self, first: u64) -> usize {
        self.shard.writer.buffer_offset(self.place(first))
    }

    fn write(&self, first: u64, buffer: &AlignedBuffer, bytes: Range<usize>) -> Result<()> {
        self.shard.writer.write(self.place(first), buffer, bytes)
    }

    fn finish(&self) -> Result<()> {
        self.told.as_ref().map_or(Ok(()), Told::finish)?;
        self.shard.finish(1)
    }
}

impl Shard {
    /// Brings what was written to the disk.
    pub(super) fn flush(&self) -> Result<()> {
        // The last tensor brings all of it there.
        if self.finished.get().is_some() { Ok(()) } else { self.writer.flush() }
    }

    /// Takes down that so many tensors are finished.
    fn finish(&self, tensors: usize) -> Result<()> {
        if self.unfinished.fetch_sub(tensors, Ordering::AcqRel) == tensors {
            let state = self.writer.finish()?;
            self.finished.get_or_init(|| state);
        }
        Ok(())
    }
}

/// How the files of a plan are read and written.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileModes {
    /// How inputs are read.
    pub read: ReadPath,
    /// Whether outputs bypass the page cache.
    pub write: DirectMode,
}

/// The name that an output file has until it is complete; unlike any that a loader looks for.
pub fn partial_name(file_name: &str) -> String {
    format!(".{}.oxmerge-partial", file_name.replace('/', "%"))
}

/// What merges are made for.
#[derive(Debug)]
pub(crate) enum Purpose {
    /// Their outputs are written.
    Written,
    /// Numbers are to be found about the tensors of the only plan, instead of merging them; as if all
    /// elements were finite, if that is said.
    Measured(Measure, bool),
    /// The outputs of the only plan are told to who observes them, and compared if that is wanted.
    Checked(Option<Arc<Against>>),
}

/// Merges of the same tensors, each read once for all of them.
#[derive(Debug)]
pub struct Merges<'a> {
    pub(super) plans: Vec<&'a Plan>,
    purpose: Purpose,
    inputs: Vec<Option<Input>>,
    /// What files that are not here are read from.
    spool: Option<Arc<Spool>>,
    /// The models' names, for messages.
    labels: Vec<Arc<str>>,
    /// Which of the kinds of tensors that there are in all plans together each tensor is.
    kind_of: Vec<u32>,
    /// Of each kind, whether nothing has to be reduced before it is computed.
    reads_once: Vec<bool>,
    /// Of each kind, which sources are read.
    read: Vec<Vec<usize>>,
    /// Of each kind, whether something of it is reduced over the whole model first.
    swept: Vec<bool>,
    /// What was made for kinds that came up lately.
    prepared: Mutex<HashMap<u32, Prepared>>,
    /// What workers hold of adapters.
    desks: Desks,
    /// The shards of each plan, when there are any yet; of a part, none for those of others.
    pub(super) shards: Vec<Vec<Option<Arc<Shard>>>>,
    /// Which part of the plans is made, unless it is all of them.
    pub(super) part: Option<Part>,
    /// What earlier runs have done, where that is wanted.
    pub(super) resumed: Option<Resumed<'a>>,
    /// Who is told of finished tensors.
    observer: Option<Arc<dyn Observer>>,
    /// Buffers of small neighbours that nobody uses now.
    spare: Mutex<Vec<Buffers>>,
}

/// How many small tensors are one unit at the most.
const MOST_NEIGHBOURS: usize = 512;
/// How many kinds are kept: neighbours are of a few.
const MOST_PREPARED: usize = 256;

impl<'a> Merges<'a> {
    /// Opens the inputs of `plans`, which must be merges of the same tensors; those that are not here
    /// are read from `spool`. Also tells what the tensors need in memory, and how many need that.
    pub fn open(
        plans: Vec<&'a Plan>,
        read: ReadPath,
        spool: Option<Arc<Spool>>,
    ) -> Result<(Self, Vec<(Need, usize)>)> {
        Self::open_to(Purpose::Written, plans, read, spool)
    }

    /// The same, for some purpose.
    pub(crate) fn open_to(
        purpose: Purpose,
        plans: Vec<&'a Plan>,
        read: ReadPath,
        spool: Option<Arc<Spool>>,
    ) -> Result<(Self, Vec<(Need, usize)>)> {
        let Some((first, others)) = plans.split_first() else {
            return Err(Error::internal("there is no merge to run"));
        };
        for other in others {
            check_same_tensors(first, other)?;
        }
        let mut numbers = HashMap::new();
        let inputs = open_inputs(first, read, spool.as_ref())?;
        let desks = Desks::default();
        let kind_of = (0..first.len())
            .map(|at| {
                let each: Vec<usize> = plans.iter().map(|plan| plan.tensor(at).kind()).collect();
                // Sources that are not plain need memory of their own.
                let sources = if first.tensor(at).is_plain() {
                    Vec::new()
                } else {
                    sources_of(&inputs, &desks, first.tensor(at))
                };
                let memory: Vec<Memory> = sources.iter().map(|source| source.memory()).collect();
                let next = numbers.len() as u32;
                *numbers.entry((each, memory)).or_insert(next)
            })
            .collect();
        let labels = first.models.iter().map(|model| Arc::from(&**model)).collect();
        let mut merges = Self {
            inputs,
            spool,
            labels,
            kind_of,
            reads_once: Vec::new(),
            read: Vec::new(),
            swept: Vec::new(),
            plans,
            purpose,
            desks,
            prepared: Mutex::default(),
            shards: Vec::new(),
            part: None,
            resumed: None,
            observer: None,
            spare: Mutex::default(),
        };
        let needs = merges.look_at_kinds(numbers.len())?;
        Ok((merges, needs))
    }

    /// Fails if a file that is read is neither here nor spooled.
    #[cfg(feature = "python")]
    pub(crate) fn check_readable(&self) -> Result<()> {
        self.inputs.iter().flatten().try_for_each(|input| match input {
            Input::Elsewhere(remote) => Err(not_here(remote)),
            Input::Here(_) | Input::Spooled(..) => Ok(()),
        })
    }

    /// Finds out what there is to know of each kind; what its tensors need, and how many they are.
    fn look_at_kinds(&mut self, kinds: usize) -> Result<Vec<(Need, usize)>> {
        let mut found = vec![(0, 0); kinds];
        for (at, &kind) in self.kind_of.iter().enumerate() {
            let (first, count) = &mut found[kind as usize];
            *first = if *count == 0 { at } else { *first };
            *count += 1;
        }
        let look = |(at, count)| {
            let task = self.make(at, nowhere(self, at))?;
            self.reads_once.push(task.reads_once);
            self.read.push(task.inputs());
            self.swept.push(task.needs_sweep());
            Ok((Need::of(&task), count))
        };
        let needs: Vec<_> = found.into_iter().map(look).collect::<Result<_>>()?;
        if self.needs_sweep() {
            return Ok(needs); // which goes over all of them
        }
        let mut made = vec![0; kinds];
        for (at, &kind) in self.kind_of.iter().enumerate() {
            made[kind as usize] += usize::from(!self.is_done(at)); // of a sample, those left out are
        }
        let made = needs.into_iter().zip(made).map(|((need, _), made)| (need, made));
        Ok(made.filter(|&(_, made)| made > 0).collect())
    }

    /// What is read of files that are not here, task by task, through a spool of `spool` bytes: in
    /// the sweep over the model, if there is one, and in the merge; of tensors that are `made` there, in
    /// the sweep if so it says.
    pub fn remote_needs(&self, spool: u64, made: impl Fn(usize, bool) -> bool) -> Result<Needs> {
        let plan = self.plans[0];
        let is_remote = |file: u32| plan.files[file as usize].remote.is_some();
        let remote = plan.files.iter().filter(|file| file.remote.is_some());
        let total = remote.map(|file| file.size).fold(0, u64::saturating_add);
        let mut needs = Needs::new(spool, total);
        for in_sweep in [true, false] {
            needs.begin_again();
            for at in if in_sweep && !self.needs_sweep() { 0..0 } else { 0..self.len() } {
                let kind = self.kind(at);
                let is_read = made(at, in_sweep) && (!in_sweep || self.swept[kind]);
                let read: &[usize] = if is_read { &self.read[kind] } else { &[] };
                let tensor = plan.tensor(at);
                let sources = tensor.sources().enumerate().filter(|(at, _)| read.contains(at));
                let mut ranges: Vec<_> =
                    sources.flat_map(|(_, source)| ranges_of(source, tensor)).collect();
                ranges.retain(|(file, _)| is_remote(*file));
                needs.add_step(&ranges);
            }
        }
        let (step, bytes) = needs.largest();
        if bytes <= spool {
            return Ok(needs);
        }
        // A larger spool has larger extents, of which a tensor needs fewer, but as many ends.
        let enough = (bytes.next_multiple_of(1 << 20)).saturating_mul(5) / 4;
        Err(Error::plan("the spool is too small for all inputs of a tensor")
            .tensor(plan.tensor(step % self.len()).name())
            .expected(format_args!("at least {} MB", enough / 1_000_000))
            .found(format_args!("{} MB", spool / 1_000_000))
            .advice(format!("allow more: `--spool {}MB`", enough / 1_000_000)))
    }

    /// Creates the shards of each plan, under partial names, in its folder; or opens those that an
    /// earlier run has left, with the tensors that it has done.
    pub fn create_shards(&mut self, folders: &[&OutputFolder], mode: DirectMode) -> Result<()> {
        let outputs = self.plans.iter().zip(folders);
        let Some(resumed) = &self.resumed else {
            let create = |(plan, folder): (&&Plan, &&OutputFolder)| {
                let create = |at| create_shard(plan, at, folder, mode, false);
                let shards = 0..plan.shards.len();
                shards.map(|at| self.makes(at).then(|| create(at)).transpose()).collect()
            };
            self.shards = outputs.map(create).collect::<Result<_>>()?;
            return Ok(());
        };
        let files = self.open_shards(folders)?;
        let create = |((plan, folder), files): ((&&Plan, &&OutputFolder), &Vec<Option<File>>)| {
            let create = |(at, file): (usize, &Option<File>)| {
                if !self.makes(at) {
                    return Ok(None);
                }
                let shard = create_shard(plan, at, folder, mode, true)?;
                let kept = plan.by_place_in(at).filter(|&index| resumed.is_done[index]);
                let mut count = 0;
                for tensor in kept.map(|index| plan.tensor(index)) {
                    let file = file.as_ref().ok_or_else(|| Error::internal("a shard is gone"))?;
                    shard.writer.keep(file, tensor.start(), tensor.bytes())?;
                    count += 1;
                }
                if count > 0 {
                    shard.finish(count)?;
                }
                Ok(Some(shard))
            };
            files.iter().enumerate().map(create).collect()
        };
        self.shards = outputs.zip(&files).map(create).collect::<Result<_>>()?;
        Ok(())
    }

    /// Whether this run makes shard `at`.
    fn makes(&self, at: usize) -> bool {
        self.part.as_ref().is_none_or(|part| part.makes(at))
    }

    /// Tells `observer` of each tensor that is finished.
    pub fn observe(&mut self, observer: Arc<dyn Observer>) {
        self.observer = Some(observer);
    }

    /// What will be told of tensor `tensor` of merge `merge`, if anyone is told.
    fn told(&self, merge: usize, tensor: usize) -> Option<Told> {
        let observer = Arc::clone(self.observer.as_ref()?);
        let about = self.plans[merge].tensor(tensor);
        let new = match self.purpose {
            // Of files that are only hashed nobody asks for more.
            Purpose::Checked(_) => Digester::of_bytes,
            _ => Digester::new,
        };
        let digester = new(about.dtype(), about.elements());
        Some(Told { digester, observer, merge, tensor })
    }

    /// For each merge, which files were written and how they were left, when all are finished.
    pub fn written(&self) -> Vec<Vec<InputFile>> {
        let states = |shards: &Vec<Option<Arc<Shard>>>| {
            shards.iter().flatten().filter_map(|shard| shard.finished.get().cloned()).collect()
        };
        self.shards.iter().map(states).collect()
    }

    /// What tensor `at` is made by in all plans.
    fn prepared(&self, at: usize) -> Result<Prepared> {
        let kind = self.kind_of[at];
        let mut cache = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(prepared) = cache.get(&kind) {
            return Ok(prepared.clone());
        }
        let work = |plan: &&Plan| match self.purpose {
            Purpose::Measured(measure, is_finite) => {
                let tensor = plan.tensor(at);
                let types: Vec<_> = tensor.sources().map(|source| source.dtype).collect();
                let finite = is_finite.then(|| tensor.elements());
                Ok(Work::numbers(measure.of(&types, finite)))
            }
            Purpose::Written | Purpose::Checked(_) => work(plan, plan.tensor(at)),
        };
        let mut all = self.plans.iter().map(work);
        let one = all.next().unwrap_or(Ok(Work::Identical))?;
        let work = all.try_fold(one, |all, work| all.and(work?))?;
        let prepared = Prepared::new(work.shared(), &frame(self.plans[0], at));
        if cache.len() == MOST_PREPARED {
            cache.clear();
        }
        cache.insert(kind, prepared.clone());
        Ok(prepared)
    }

    fn make(&self, at: usize, sinks: Vec<Arc<dyn Sink>>) -> Result<Task> {
        let tensor = self.plans[0].tensor(at);
        let sources = sources_of(&self.inputs, &self.desks, tensor);
        self.task_of(at, sources, sinks)
    }

    fn task_of(
        &self,
        at: usize,
        sources: Vec<Arc<dyn Source>>,
        sinks: Vec<Arc<dyn Sink>>,
    ) -> Result<Task> {
        let tensor = self.plans[0].tensor(at);
        let labels = tensor.sources().map(|source| Arc::clone(&self.labels[source.model]));
        let prepared = self.prepared(at)?;
        let task =
            Task::prepared(frame(self.plans[0], at), sources, labels.collect(), sinks, prepared);
        Ok(task.in_f64(self.plans[0].in_f64).with_base(tensor.base()))
    }

    fn is_small(&self, at: usize) -> bool {
        let tensor = self.plans[0].tensor(at);
        (1..=SMALL).contains(&tensor.elements()) && tensor.is_plain()
    }

    /// Whether tensor `at` follows the one before it in the same shard of every plan.
    fn follows(&self, at: usize) -> bool {
        self.plans.iter().all(|plan| {
            let (before, tensor) = (plan.tensor(at - 1), plan.tensor(at));
            before.shard() == tensor.shard() && before.start() + before.bytes() == tensor.start()
        })
    }

    /// Bytes of the sources and outputs of a tensor.
    fn bytes(&self, at: usize) -> u64 {
        let outputs: u64 = self.plans.iter().map(|plan| plan.tensor(at).bytes()).sum();
        self.plans[0].tensor(at).source_bytes() + outputs
    }
}

impl Tasks for Merges<'_> {
    fn len(&self) -> usize {
        self.kind_of.len()
    }

    fn task(&self, index: usize) -> Result<Task> {
        let sink = |(merge, plan): (usize, &&Plan)| -> Arc<dyn Sink> {
            let tensor = plan.tensor(index);
            let (dtype, start, told) = (tensor.dtype(), tensor.start(), self.told(merge, index));
            if let Purpose::Checked(against) = &self.purpose {
                let against = against.clone().map(|against| (against, index));
                return Arc::new(CheckingSink { dtype, told, against });
            }
            match self.shards[merge][tensor.shard()].clone() {
                Some(shard) => Arc::new(FileSink { shard, dtype, start, told }),
                None => Arc::new(FileLike(dtype)),
            }
        };
        let sinks = match self.purpose {
            Purpose::Measured(..) => Vec::new(),
            _ => self.plans.iter().enumerate().map(sink).collect(),
        };
        self.make(index, sinks)
    }

    fn kind(&self, index: usize) -> usize {
        self.kind_of[index] as usize
    }

    fn reads_once(&self, index: usize) -> bool {
        self.reads_once[self.kind(index)]
    }

    fn needs_sweep(&self) -> bool {
        self.swept.contains(&true)
    }

    fn are_read(&self, tasks: Range<usize>, in_sweep: bool) {
        if let Some(spool) = &self.spool {
            // The steps of the merge come after those of the sweep.
            let first = if self.needs_sweep() && !in_sweep { self.len() } else { 0 };
            spool.finished(first + tasks.start..first + tasks.end);
        }
    }

    fn is_ours(&self, index: usize) -> bool {
        self.makes(self.plans[0].tensor(index).shard())
    }

    fn is_done(&self, index: usize) -> bool {
        if let Purpose::Checked(Some(against)) = &self.purpose {
            return !against.has(index);
        }
        self.resumed.as_ref().is_some_and(|resumed| resumed.is_done[index])
    }

    fn known_numbers(&self) -> BTreeMap<usize, Vec<f64>> {
        let mut known = self.part.as_ref().map(|part| part.swept().clone()).unwrap_or_default();
        known.extend(self.resumed.iter().flat_map(|resumed| resumed.numbers.clone()));
        known
    }

    fn waits_for_room(&self) -> bool {
        self.spool.is_some()
    }

    fn with_others(
        &self,
        found: BTreeMap<usize, Vec<f64>>,
        control: &Control,
    ) -> Result<BTreeMap<usize, Vec<f64>>> {
        self.desks.clear(); // the threads that looked for them are gone
        match &self.part {
            None => Ok(found),
            Some(part) => part.exchange(found, self.len(), control),
        }
    }

    fn finished(&self, index: usize) {
        if let Some(resumed) = &self.resumed {
            resumed.journal.tensor(index);
        }
    }

    fn found(&self, index: usize, numbers: &[f64]) {
        if let Some(resumed) = &self.resumed {
            resumed.journal.numbers(index, numbers);
        }
    }

    fn neighbours(&self, index: usize, bytes: u64) -> usize {
        if matches!(self.purpose, Purpose::Checked(_)) {
            return 0; // they are not written in one go
        }
        let mut left = bytes;
        let fits = |&at: &usize| {
            let wanted = self.bytes(at);
            let fits = self.is_small(at) && self.is_ours(at) && !self.is_done(at);
            let fits = fits && wanted <= left && (at == index || self.follows(at));
            left -= if fits { wanted } else { 0 };
            fits
        };
        (index..self.len()).take(MOST_NEIGHBOURS).take_while(fits).count()
    }

    fn gather<'a>(&'a self, tasks: Range<usize>) -> Result<Box<dyn Gathered + 'a>> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut buffers = spare.unwrap_or_default();
        let places = self.read_neighbours(&tasks, &mut buffers.input)?;
        buffers.outputs.resize_with(self.plans.len(), Default::default);
        for (written, output) in self.written_by(&tasks).zip(&buffers.outputs) {
            let output = &mut *output.lock().unwrap_or_else(PoisonError::into_inner);
            output.grow(written.bytes.end)?;
        }
        let told = |merge| tasks.clone().filter_map(move |at| self.told(merge, at).map(Arc::new));
        let told = (0..self.plans.len()).map(|merge| told(merge).collect()).collect();
        Ok(Box::new(Neighbours { merges: self, tasks, places, buffers, told }))
    }
}

/// What small neighbours write in one go.
struct Written<'a> {
    shard: &'a Shard,
    /// Where in the shard they begin.
    start: u64,
    /// Where in a buffer they lie.
    bytes: Range<usize>,
}

impl Merges<'_> {
    /// What `tasks`, which are neighbours, write of each merge.
    fn written_by(&self, tasks: &Range<usize>) -> impl Iterator<Item = Written<'_>> {
        let (first, last) = (tasks.start, tasks.end - 1);
        self.plans.iter().zip(&self.shards).map(move |(plan, shards)| {
            let (first, last) = (plan.tensor(first), plan.tensor(last));
            let shard = shards[first.shard()].as_deref();
            let shard = shard.expect("what is written lies in a shard of this run");
            let start = first.start();
            let skip = shard.writer.buffer_offset(start);
            let bytes = (last.start() + last.bytes() - start) as usize;
            Written { shard, start, bytes: skip..skip + bytes }
        })
    }

    /// Reads the inputs of small neighbours into `buffer`, those that lie together in one go. Where in
    /// the buffer each source of each tensor begins.
    fn read_neighbours(
        &self,
        tasks: &Range<usize>,
        buffer: &mut Arc<AlignedBuffer>,
    ) -> Result<Vec<Vec<usize>>> {
        let (mut ranges, mut places) = (Vec::new(), Vec::new());
        for at in tasks.clone() {
            let tensor = self.plans[0].tensor(at);
            let read = &self.read[self.kind(at)];
            for (number, source) in tensor.sources().enumerate() {
                if !read.contains(&number) {
                    continue;
                }
                let bytes = tensor.elements() * source.dtype.size() as u64;
                ranges.push((source.file, source.start, bytes, (places.len(), number)));
            }
            places.push(vec![0; tensor.sources().len()]);
        }
        let total: u64 = ranges.iter().map(|(_, _, bytes, _)| bytes).sum();
        // Through a spool tensor by tensor, each of which may go before the next has come.
        let is_spooled = self.spool.is_some();
        if !is_spooled {
            ranges.sort_unstable();
        }
        // Shared only while tasks use it; those of the group before are gone.
        if Arc::get_mut(buffer).is_none() {
            *buffer = Arc::default();
        }
        let memory = Arc::get_mut(buffer).ok_or_else(|| Error::internal("a buffer is shared"))?;
        memory.grow(total as usize)?;
        let (mut filled, mut read, mut rest) = (0, 0, &ranges[..]);
        while let Some(&(file, start, ..)) = rest.first() {
            let mut end = start;
            let together = rest.iter().take_while(|&&(other, begin, bytes, _)| {
                let joins = other == file && begin == end && (begin == start || !is_spooled);
                end = if joins { begin + bytes } else { end };
                joins
            });
            let (run, others) = rest.split_at(together.count());
            let bytes = (end - start) as usize;
            let input = self.inputs[file].as_ref();
            let input = input.ok_or_else(|| Error::internal("an input is not open"))?;
            input.read_into(start, &mut memory.as_mut_slice()[filled..filled + bytes])?;
            for &(_, begin, _, (tensor, number)) in run {
                places[tensor][number] = filled + (begin - start) as usize;
            }
            (filled, rest) = (filled + bytes, others);
            if is_spooled {
                let next = rest.first().map_or(places.len(), |(_, _, _, (tensor, _))| *tensor);
                self.are_read(tasks.start + read..tasks.start + next, false);
                read = next;
            }
        }
        Ok(places)
    }
}

/// What small neighbours are read into and computed into.
#[derive(Debug, Default)]
struct Buffers {
    input: Arc<AlignedBuffer>,
    outputs: Vec<Arc<Mutex<AlignedBuffer>>>,
}

/// Small neighbours, with their inputs in memory.
#[derive(Debug)]
struct Neighbours<'a> {
    merges: &'a Merges<'a>,
    tasks: Range<usize>,
    /// Where each source of each tensor begins in the input buffer.
    places: Vec<Vec<usize>>,
    buffers: Buffers,
    /// For each merge, what will be told of each tensor, if anyone is told.
    told: Vec<Vec<Arc<Told>>>,
}

impl Gathered for Neighbours<'_> {
    fn task(&self, index: usize) -> Result<Task> {
        let plans = &self.merges.plans;
        let tensor = plans[0].tensor(index);
        let source = |(source, &start): (plan::Source<'_>, &usize)| -> Arc<dyn Source> {
            let buffer = Arc::clone(&self.buffers.input);
            Arc::new(BufferSource { buffer, dtype: source.dtype, start })
        };
        let sources =
            tensor.sources().zip(&self.places[index - self.tasks.start]).map(source).collect();
        let outputs = self.merges.written_by(&self.tasks).zip(&self.buffers.outputs);
        let outputs = outputs.zip(&self.told);
        let sink =
            |(plan, ((written, buffer), told)): (&&Plan, ((Written<'_>, &Arc<_>), &Vec<_>))| {
                let tensor = plan.tensor(index);
                let start = written.bytes.start + (tensor.start() - written.start) as usize;
                let buffer = Arc::clone(buffer);
                let told = told.get(index - self.tasks.start).map(Arc::clone);
                let sink: Arc<dyn Sink> =
                    Arc::new(BufferSink { buffer, dtype: tensor.dtype(), start, told });
                sink
            };
        let sinks = plans.iter().zip(outputs).map(sink).collect();
        self.merges.task_of(index, sources, sinks)
    }

    fn finish(self: Box<Self>) -> Result<()> {
        let Self { merges, tasks, buffers, told, .. } = *self;
        let outputs = merges.written_by(&tasks).zip(&buffers.outputs);
        for ((written, output), told) in outputs.zip(told) {
            let Written { shard, start, bytes } = written;
            let output = output.lock().unwrap_or_else(PoisonError::into_inner);
            shard.writer.write(start, &output, bytes)?;
            told.iter().try_for_each(|told| told.finish())?;
            shard.finish(tasks.len())?;
        }
        merges.spare.lock().unwrap_or_else(PoisonError::into_inner).push(buffers);
        Ok(())
    }
}

/// A tensor in a buffer of small neighbours.
#[derive(Debug)]
struct BufferSource {
    buffer: Arc<AlignedBuffer>,
    dtype: DType,
    start: usize,
}

impl Source for BufferSource {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn is_in_place(&self) -> bool {
        true
    }

    fn read<'a>(&'a self, elements: Range<u64>, _: &'a mut AlignedBuffer) -> Result<&'a [u8]> {
        let at = |element: u64| self.start + element as usize * self.dtype.size();
        Ok(&self.buffer.as_slice()[at(elements.start)..at(elements.end)])
    }
}

/// The same for an output.
#[derive(Debug)]
struct BufferSink {
    buffer: Arc<Mutex<AlignedBuffer>>,
    dtype: DType,
    start: usize,
    told: Option<Arc<Told>>,
}

impl Sink for BufferSink {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn digester(&self) -> Option<&Digester> {
        self.told.as_ref().map(|told| &told.digester)
    }

    fn takes_any_piece(&self) -> bool {
        true
    }

    fn write(&self, first: u64, buffer: &AlignedBuffer, bytes: Range<usize>) -> Result<()> {
        let mut memory = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let start = self.start + first as usize * self.dtype.size();
        memory.as_mut_slice()[start..start + bytes.len()]
            .copy_from_slice(&buffer.as_slice()[bytes]);
        Ok(())
    }
}

/// Sinks of the types that tensor `at` has in each plan, which take nothing: for what is only planned.
fn nowhere(merges: &Merges<'_>, at: usize) -> Vec<Arc<dyn Sink>> {
    if matches!(merges.purpose, Purpose::Measured(..)) {
        return Vec::new();
    }
    let sink = |plan: &&Plan| -> Arc<dyn Sink> { Arc::new(FileLike(plan.tensor(at).dtype())) };
    merges.plans.iter().map(sink).collect()
}

/// Stands in for an output that is not yet there, or that another run makes.
#[derive(Debug)]
struct FileLike(DType);

impl Sink for FileLike {
    fn dtype(&self) -> DType {
        self.0
    }

    fn takes_any_piece(&self) -> bool {
        true
    }

    fn write(&self, _first: u64, _buffer: &AlignedBuffer, _bytes: Range<usize>) -> Result<()> {
        Err(Error::internal("a shard was written before it was made"))
    }
}

/// Whether two plans make the same tensors, in the same order, of the same bytes.
fn check_same_tensors<'a>(plan: &'a Plan, other: &'a Plan) -> Result<()> {
    let differs = |what: &str| {
        Error::plan(format!("merges that are made together must have the same {what}"))
            .advice("run them one by one")
    };
    if plan.files != other.files {
        return Err(differs("input files"));
    }
    if plan.seed != other.seed {
        return Err(differs("seed"));
    }
    if plan.len() != other.len() {
        return Err(differs("tensors"));
    }
    // In f64 all outputs would be computed in it, and others than alone.
    let double = |plan: &Plan, tensor: Tensor<'_>| plan.in_f64 || tensor.dtype() == DType::F64;
    let (one, two) = (plan.tensors(), other.tensors());
    if one.map(|tensor| double(plan, tensor)).ne(two.map(|tensor| double(other, tensor))) {
        return Err(differs("working type: all of them float64, or none"));
    }
    let place = |source: plan::Source<'a>| {
        (source.file, source.start, source.dtype, source.adapted, source.rows)
    };
    for (tensor, other) in plan.tensors().zip(other.tensors()) {
        let is_same = tensor.name() == other.name()
            && tensor.shape() == other.shape()
            && tensor.sources().map(place).eq(other.sources().map(place));
        if !is_same {
            return Err(differs("tensors, made of the same inputs").tensor(tensor.name()));
        }
    }
    Ok(())
}

/// What a tensor of `plan` is made by; the first problem as an error.
pub(crate) fn work(plan: &Plan, tensor: Tensor<'_>) -> Result<Work> {
    let owned = tensor.to_owned();
    Work::of(&plan.method, &owned).map_err(|error| error.tensor(owned.name))
}

/// What the merge method finds wrong with the tensors of `plan`.
pub fn problems(plan: &Plan) -> Vec<Error> {
    let mut is_wrong = vec![None; plan.kinds()];
    let find = |tensor: Tensor<'_>| {
        let known = &mut is_wrong[tensor.kind()];
        // Of a kind in which something is wrong every tensor is told.
        if *known == Some(false) {
            return None;
        }
        let error = work(plan, tensor).err();
        *known = Some(error.is_some());
        error
    };
    plan.tensors().filter_map(find).collect()
}

/// What each kind of tensors of `plan` is made by, as text, and its settings.
pub fn formulas(plan: &Plan) -> Result<Vec<(String, Settings)>> {
    let mut kinds = vec![None; plan.kinds()];
    for tensor in plan.tensors() {
        let kind = &mut kinds[tensor.kind()];
        if kind.is_none() {
            let formula = match tensor.formula() {
                Some(formula) => format!("{formula:?}"),
                None => format!("{:?}", work(plan, tensor)?),
            };
            *kind = Some((formula, tensor.settings().clone()));
        }
    }
    Ok(kinds.into_iter().flatten().collect())
}

fn frame(plan: &Plan, at: usize) -> TensorFrame {
    let tensor = plan.tensor(at);
    TensorFrame::new(tensor.name(), plan.seed, tensor.shape())
}

/// A plan whose tensors are computed one by one, when they are asked for, and go elsewhere than into
/// its shards.
#[derive(Debug)]
pub struct OnDemand {
    plan: Arc<Plan>,
    inputs: Vec<Option<Input>>,
    spool: Option<Arc<Spool>>,
}

impl OnDemand {
    /// Opens the inputs of `plan`; those that are not here are read from `spool`.
    pub fn open(plan: Arc<Plan>, read: ReadPath, spool: Option<Arc<Spool>>) -> Result<Self> {
        let inputs = open_inputs(&plan, read, spool.as_ref())?;
        Ok(Self { plan, inputs, spool })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What remote inputs come by.
    pub fn spool(&self) -> Option<Arc<Spool>> {
        self.spool.clone()
    }

    /// The task that makes tensor `index` of the plan, into `sink`.
    pub fn task(&self, index: usize, sink: Arc<dyn Sink>) -> Result<Task> {
        let tensor = self.plan.tensor(index);
        let work = work(&self.plan, tensor)?;
        Ok(Task::new(
            tensor.name(),
            self.plan.seed,
            tensor.shape(),
            sources_of(&self.inputs, &Desks::default(), tensor),
            tensor.sources().map(|source| self.plan.models[source.model].clone()).collect(),
            vec![sink],
            work,
        )
        .in_f64(self.plan.in_f64))
    }

    /// Whether an input of tensor `index` has an element that is NaN or infinite; nothing is known if
    /// one is not here.
    pub fn has_odd_input(&self, index: usize, control: &Control) -> Result<Option<bool>> {
        let tensor = self.plan.tensor(index);
        let files = self.plan.files_of(std::iter::once(tensor));
        if files.into_iter().any(|file| self.plan.files[file].remote.is_some()) {
            return Ok(None);
        }
        let mut scratch = AlignedBuffer::default();
        for source in sources_of(&self.inputs, &Desks::default(), tensor) {
            let dtype = source.dtype();
            for block in steps(0..tensor.elements(), BLOCK as u64) {
                control.check()?;
                let bytes = source.read(block, &mut scratch)?;
                let mut cells = bytes.chunks(CELL * dtype.size());
                let is_finite =
                    |cell: &[u8]| compare(Level::detect(), dtype, cell, None).is_finite();
                if dtype.is_float() && !cells.all(is_finite) {
                    return Ok(Some(true));
                }
            }
        }
        Ok(Some(false))
    }

    /// Fails if a file that tensor `index` is made of is not what it was.
    pub fn check_unchanged(&self, index: usize) -> Result<()> {
        let files = self.plan.files_of(std::iter::once(self.plan.tensor(index)));
        let files: Vec<_> = files.into_iter().map(|file| self.plan.files[file].clone()).collect();
        io::check_unchanged(&files)
    }
}

/// The files that some source lies in, opened; those that are not here are read from `spool`.
fn open_inputs(
    plan: &Plan,
    read: ReadPath,
    spool: Option<&Arc<Spool>>,
) -> Result<Vec<Option<Input>>> {
    io::raise_open_file_limit();
    let mut inputs = vec![None; plan.files.len()];
    for at in plan.files_of(plan.tensors()) {
        let file = &plan.files[at];
        inputs[at] = Some(match (&file.remote, spool) {
            (None, _) => Input::Here(Arc::new(InputReader::open(file, read)?)),
            (Some(_), Some(spool)) => Input::Spooled(Arc::clone(spool), at as u32),
            (Some(remote), None) => Input::Elsewhere(remote.clone()),
        });
    }
    Ok(inputs)
}

fn not_here(remote: &Remote) -> Error {
    Error::internal("a file is to be read before it is here").file(&remote.label)
}

/// Which bytes of which files a source of `tensor` is read from.
fn ranges_of(source: plan::Source<'_>, tensor: Tensor<'_>) -> Vec<(u32, Range<u64>)> {
    let range =
        |file: u32, start: u64, elements: u64, dtype: DType, change: Option<&Arc<Adapted>>| {
            // Of what is adapted, the type is that of the result.
            let dtype = change.map_or(dtype, |of| of.dtype);
            let span = change.map_or(elements, |of| of.span(elements));
            (file, start..start + span * dtype.size() as u64)
        };
    let width: u64 = tensor.shape().iter().skip(1).product();
    match source.rows {
        None => {
            let (file, elements) = (source.file as u32, tensor.elements());
            vec![range(file, source.start, elements, source.dtype, source.adapted)]
        }
        Some(rows) => {
            let part = |part: &plan::Part| {
                let change = part.adapted.map(|number| &rows.adapted[number as usize]);
                range(part.file, part.start, part.rows * width, part.dtype, change)
            };
            rows.parts.iter().map(part).collect()
        }
    }
}

/// The sources of a tensor, in opened files.
fn sources_of(inputs: &[Option<Input>], desks: &Desks, tensor: Tensor<'_>) -> Vec<Arc<dyn Source>> {
    let file_source = |file: usize, dtype: DType, start: u64, sharing: Sharing| {
        let source: Arc<dyn Source> =
            match inputs[file].clone().expect("every file with a source is opened") {
                Input::Here(reader) => Arc::new(FileSource { reader, dtype, start, sharing }),
                input => Arc::new(RemoteSource { input, dtype, start }),
            };
        source
    };
    let task = if tensor.is_plain() { 0 } else { task_number() };
    // Of all sources together, parts of rows are numbered as well.
    let mut number = 0;
    let mut range = |(file, start, dtype): (usize, u64, DType),
                     change: Option<&Arc<Adapted>>,
                     sharing: Sharing,
                     elements: u64|
     -> Arc<dyn Source> {
        let base = file_source(file, change.map_or(dtype, |change| change.dtype), start, sharing);
        let Some(change) = change else { return base };
        let base = match &change.strides {
            Some(strides) => Arc::new(StridedSource::new(base, strides)),
            None => base,
        };
        if change.is_view() {
            return base;
        }
        let mut files: Vec<u32> = change.files().collect();
        files.sort_unstable();
        files.dedup();
        // Adapters are small, and read in any order: they are here whenever the tensor is computed.
        let opened = |file: u32| match &inputs[file as usize] {
            Some(Input::Here(reader)) => Some((file, Arc::clone(reader))),
            _ => None,
        };
        let files = files.into_iter().filter_map(opened).collect();
        number += 1;
        adapted(base, change, dtype, elements, files, (task, number), desks)
    };
    let elements = tensor.elements();
    let places: Vec<_> = tensor.sources().map(|source| (source.file, source.start)).collect();
    let mut sources = Vec::with_capacity(places.len());
    for (at, source) in tensor.sources().enumerate() {
        let place = (source.file, source.start, source.dtype);
        let sharing =
            match (places[..at].contains(&places[at]), places[at + 1..].contains(&places[at])) {
                (true, _) => Sharing::Again,
                (false, true) => Sharing::First,
                (false, false) => Sharing::Alone,
            };
        sources.push(match source.rows {
            None => range(place, source.adapted, sharing, elements),
            Some(rows @ plan::Rows { map, parts, .. }) => {
                let width = tensor.shape()[1..].iter().product::<u64>();
                let part = |part: &plan::Part| {
                    let change = part.adapted.map(|number| &rows.adapted[number as usize]);
                    let place = (part.file as usize, part.start, part.dtype);
                    range(place, change, Sharing::Alone, part.rows * width)
                };
                let parts = parts.iter().map(part).collect();
                Arc::new(RowsSource::new(Arc::clone(map), parts, width))
            }
        });
    }
    sources
}

/// Creates a shard, or with `resume` opens the one that an earlier run has left.
fn create_shard(
    plan: &Plan,
    index: usize,
    folder: &OutputFolder,
    mode: DirectMode,
    resume: bool,
) -> Result<Arc<Shard>> {
    let OutputShard { ref file_name, header_bytes, size } = plan.shards[index];
    let name = partial_name(file_name);
    let header = |out: &mut dyn fmt::Write| put_header(plan, index, out);
    let writer = if resume {
        ShardWriter::resume(folder, &name, header_bytes, header, size, mode)?
    } else {
        ShardWriter::create(folder, &name, header_bytes, header, size, mode)?
    };
    let unfinished = AtomicUsize::new(plan.tensors_of_shard(index).len());
    Ok(Arc::new(Shard { writer, unfinished, finished: OnceLock::new() }))
}
