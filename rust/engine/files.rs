//! Sources and sinks that are byte ranges of files, and the tasks of a plan over them.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use super::need::{Need, Way};
use super::source::{Sink, Source};
use super::task::{Task, Work};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::formula::machine::TensorFrame;
use crate::io::{
    self, AlignedBuffer, DirectMode, InputReader, OutputFolder, ReadPath, ShardWriter,
};
use crate::plan::{InputFile, OutputShard, OutputTensor, Plan, SourceTensor};

/// A tensor in an input file.
#[derive(Debug)]
struct FileSource {
    reader: Arc<InputReader>,
    dtype: DType,
    start: u64,
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
        self.reader.read_direct(start, length, scratch)
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

/// An output shard; it is flushed when its last tensor is finished.
#[derive(Debug)]
struct Shard {
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
        if self.shard.unfinished.fetch_sub(1, Ordering::AcqRel) == 1 {
            let state = self.shard.writer.finish()?;
            self.shard.finished.get_or_init(|| state);
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

/// The shards of merges that are made together.
#[derive(Debug)]
pub struct Written(Vec<Vec<Arc<Shard>>>);

impl Written {
    /// For each merge, which files were written and how they were left, when all are finished.
    pub fn states(&self) -> Vec<Vec<&InputFile>> {
        let merges = self.0.iter();
        merges
            .map(|shards| shards.iter().filter_map(|shard| shard.finished.get()).collect())
            .collect()
    }
}

/// The tasks of merges of the same tensors, each read once for all of them; creates the shards of
/// each plan, under partial names, in its directory.
pub fn tasks(merges: &[(Plan, OutputFolder)], modes: FileModes) -> Result<(Vec<Task>, Written)> {
    let plans: Vec<&Plan> = merges.iter().map(|(plan, _)| plan).collect();
    let work = works(&plans)?;
    let plan = plans[0];
    let readers = open_inputs(plan, modes.read)?;
    let create = |(plan, folder): &(Plan, OutputFolder)| create_shards(plan, folder, modes.write);
    let shards = merges.iter().map(create).collect::<Result<Vec<_>>>()?;
    let task = |(index, work): (usize, Work)| {
        let sink = |(plan, shards): (&&Plan, &Vec<Arc<Shard>>)| -> Arc<dyn Sink> {
            let OutputTensor { shard, dtype, start, .. } = plan.tensors[index];
            Arc::new(FileSink { shard: Arc::clone(&shards[shard]), dtype, start })
        };
        let sinks = plans.iter().zip(&shards).map(sink).collect();
        task(plan, &plan.tensors[index], &readers, sinks, work)
    };
    let tasks = work.into_iter().enumerate().map(task).collect();
    Ok((tasks, Written(shards)))
}

/// What each tensor is made by in all of `plans`, which must be merges of the same tensors.
fn works(plans: &[&Plan]) -> Result<Vec<Work>> {
    let Some((first, others)) = plans.split_first() else {
        return Err(Error::internal("there is no merge to run"));
    };
    for other in others {
        check_same_tensors(first, other)?;
    }
    let together = |index: usize| {
        let mut all = plans.iter().map(|plan| work(plan, &plan.tensors[index]));
        let one = all.next().unwrap_or(Ok(Work::Identical))?;
        all.try_fold(one, |all, work| all.and(work?))
    };
    (0..first.tensors.len()).map(together).collect()
}

/// Whether two plans make the same tensors, in the same order, of the same bytes.
fn check_same_tensors(plan: &Plan, other: &Plan) -> Result<()> {
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
    if plan.tensors.len() != other.tensors.len() {
        return Err(differs("tensors"));
    }
    // In f64 all outputs would be computed in it, and others than alone.
    let double = |tensor: &OutputTensor| tensor.dtype == DType::F64;
    if plan.tensors.iter().map(double).ne(other.tensors.iter().map(double)) {
        return Err(differs("working type: all of them float64, or none"));
    }
    let place = |source: &SourceTensor| (source.file, source.start, source.dtype);
    for (tensor, other) in plan.tensors.iter().zip(&other.tensors) {
        let is_same = tensor.name == other.name
            && tensor.shape == other.shape
            && tensor.sources.iter().map(place).eq(other.sources.iter().map(place));
        if !is_same {
            return Err(differs("tensors, made of the same inputs").tensor(&tensor.name));
        }
    }
    Ok(())
}

/// What a tensor of `plan` is made by; the first problem as an error.
pub(crate) fn work(plan: &Plan, tensor: &OutputTensor) -> Result<Work> {
    Work::of(&plan.method, tensor).map_err(|error| error.tensor(&tensor.name))
}

/// The task that makes `tensor` of `plan`.
fn task(
    plan: &Plan,
    tensor: &OutputTensor,
    readers: &[Option<Arc<InputReader>>],
    sinks: Vec<Arc<dyn Sink>>,
    work: Work,
) -> Task {
    let source = |source| -> Arc<dyn Source> { Arc::new(file_source(readers, source)) };
    Task::new(
        &tensor.name,
        plan.seed,
        &tensor.shape,
        tensor.sources.iter().map(source).collect(),
        tensor.sources.iter().map(|source| source.model.clone()).collect(),
        sinks,
        work,
    )
}

/// A plan whose tensors are computed one by one, when they are asked for, and go elsewhere than into
/// its shards.
#[derive(Debug)]
pub struct OnDemand {
    plan: Plan,
    readers: Vec<Option<Arc<InputReader>>>,
}

impl OnDemand {
    /// Opens the inputs of `plan`.
    pub fn open(plan: Plan, read: ReadPath) -> Result<Self> {
        let readers = open_inputs(&plan, read)?;
        Ok(Self { plan, readers })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The task that makes tensor `index` of the plan, into `sink`.
    pub fn task(&self, index: usize, sink: Arc<dyn Sink>) -> Result<Task> {
        let tensor = &self.plan.tensors[index];
        let work = work(&self.plan, tensor)?;
        Ok(task(&self.plan, tensor, &self.readers, vec![sink], work))
    }

    /// Fails if a file that tensor `index` is made of is not what it was.
    pub fn check_unchanged(&self, index: usize) -> Result<()> {
        let sources = &self.plan.tensors[index].sources;
        let files = sources.iter().map(|source| self.plan.files[source.file].clone());
        io::check_unchanged(&files.collect::<Vec<_>>())
    }
}

/// What each tensor of merges that are made together needs in memory, when their files are read as
/// `read` says.
pub fn needs(plans: &[&Plan], read: ReadPath) -> Result<Vec<Need>> {
    let works = works(plans)?;
    let plan = plans[0];
    let readers = open_inputs(plan, read)?;
    let need = |(index, work): (usize, Work)| {
        let tensor = &plan.tensors[index];
        let frame = TensorFrame::new(&tensor.name, plan.seed, &tensor.shape);
        let work = work.shared();
        let once = work.reads_once();
        let sources = tensor.sources.iter().map(|source| {
            let source = file_source(&readers, source);
            (source.dtype(), Way::of(&source, frame.elements, once))
        });
        let outputs = plans.iter().map(|plan| plan.tensors[index].dtype);
        Need::new(&frame, &work, work.in_bands(&frame), sources, outputs)
    };
    Ok(works.into_iter().enumerate().map(need).collect())
}

/// The files that some source lies in, opened.
fn open_inputs(plan: &Plan, read: ReadPath) -> Result<Vec<Option<Arc<InputReader>>>> {
    io::raise_open_file_limit();
    let mut used = vec![false; plan.files.len()];
    for source in plan.tensors.iter().flat_map(|tensor| &tensor.sources) {
        used[source.file] = true;
    }
    let open = |(file, used): (&InputFile, bool)| {
        used.then(|| InputReader::open(file, read).map(Arc::new)).transpose()
    };
    plan.files.iter().zip(used).map(open).collect()
}

fn file_source(readers: &[Option<Arc<InputReader>>], source: &SourceTensor) -> FileSource {
    let reader = readers[source.file].clone().expect("every file with a source is opened");
    FileSource { reader, dtype: source.dtype, start: source.start }
}

fn create_shards(plan: &Plan, folder: &OutputFolder, mode: DirectMode) -> Result<Vec<Arc<Shard>>> {
    let mut unfinished = vec![0; plan.shards.len()];
    for tensor in &plan.tensors {
        unfinished[tensor.shard] += 1;
    }
    let create = |(shard, unfinished): (&OutputShard, usize)| {
        let name = partial_name(&shard.file_name);
        let writer = ShardWriter::create(folder, &name, &shard.header, shard.size, mode)?;
        let unfinished = AtomicUsize::new(unfinished);
        Ok(Arc::new(Shard { writer, unfinished, finished: OnceLock::new() }))
    };
    plan.shards.iter().zip(unfinished).map(create).collect()
}
