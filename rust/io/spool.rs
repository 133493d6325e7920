//! A bounded file on the local disk for what is read of files that lie elsewhere.
//!
//! Remote files are cut into *extents* of one size. The order of the work tells in advance which of
//! them each step reads ([`Needs`]), so they are fetched in that order, ahead of the workers and as
//! far as the spool has room. A read waits for its extents. What no step needs any more makes room
//! at once; else the extent that is needed last makes room for one that is needed earlier, and is
//! fetched again for that: the fewest fetches that this much room allows.
//!
//! Nothing waits for ever, as long as who reads begins steps in order, and goes on with the oldest
//! one when it can: what that one waits for is given room at the cost of any other.
//!
//! The spool is one file of as many slots as fit the bound, so it cannot grow beyond that on any file
//! system. It has no name: it is gone with the process, however that ends.
//!
//! Who fetches is not known here. It asks for the [next](Spool::next) extent, [puts](Spool::put) the
//! bytes in as they come, and says when they are [there](Spool::arrived). It is given none before the
//! work [begins](Spool::begin): of a work that goes on, what is done is over by then, and is not fetched
//! for.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use super::positioned::read_exact_at;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of an extent: large enough for a request to be worth its latency, small enough for several
/// to be under way at once.
const EXTENTS: Range<u64> = 64 << 10..(32 << 20) + 1;
/// How many extents a spool should have room for.
const WANTED_SLOTS: u64 = 64;
/// How many extents all files together may have.
const MOST_EXTENTS: u64 = 1 << 16;
/// Between two visits of an extent that are so few steps apart it is not let go.
const CLOSE_BY: usize = 8;

/// Which extents of remote files the steps of a work read.
#[derive(Clone, Debug)]
pub struct Needs {
    extent_bytes: u64,
    /// By file and number in it.
    numbers: HashMap<(u32, u64), u32>,
    extents: Vec<Extent>,
    /// In the order in which they begin.
    visits: Vec<Visit>,
    steps: usize,
    /// The first step of those that go through the files together.
    since: usize,
    /// The step that reads the most extents, and how many.
    largest: (usize, usize),
}

#[derive(Clone, Debug)]
struct Extent {
    file: u32,
    /// The part of it that is read.
    bytes: Range<u64>,
    /// Indices of its visits.
    visits: Vec<u32>,
}

/// Steps, one soon after the other, that read an extent.
#[derive(Clone, Copy, Debug)]
struct Visit {
    extent: u32,
    first: usize,
    last: usize,
}

impl Needs {
    /// Of a work that reads files of `total` bytes through a spool of `spool` bytes; no steps yet.
    pub fn new(spool: u64, total: u64) -> Self {
        let extent = (spool / WANTED_SLOTS).clamp(EXTENTS.start, EXTENTS.end - 1);
        // Round down for many slots, but up where there would be too many extents.
        let extent = 1 << extent.ilog2();
        let extent_bytes = (total / MOST_EXTENTS).max(1).next_power_of_two().max(extent);
        Self {
            extent_bytes,
            numbers: HashMap::new(),
            extents: Vec::new(),
            visits: Vec::new(),
            steps: 0,
            since: 0,
            largest: (0, 0),
        }
    }

    /// The steps that follow go through the files once more.
    pub fn begin_again(&mut self) {
        self.since = self.steps;
    }

    /// Adds a step that reads these bytes of files, side by side from the first on.
    pub fn add_step(&mut self, reads: &[(u32, Range<u64>)]) {
        let step = self.steps;
        self.steps += 1;
        let mut touched = BTreeMap::new();
        for (file, bytes) in reads {
            let numbers = bytes.start / self.extent_bytes..bytes.end.div_ceil(self.extent_bytes);
            for number in if bytes.is_empty() { 0..0 } else { numbers } {
                let start = bytes.start.max(number * self.extent_bytes);
                let end = bytes.end.min((number + 1) * self.extent_bytes);
                let extent = self.extent(*file, number, start..end);
                let into = start - bytes.start;
                touched
                    .entry(extent)
                    .and_modify(|at: &mut u64| *at = into.min(*at))
                    .or_insert(into);
            }
        }
        if touched.len() > self.largest.1 {
            self.largest = (step, touched.len());
        }
        // Workers read all inputs from the first element on.
        let mut order: Vec<_> = touched.into_iter().map(|(extent, into)| (into, extent)).collect();
        order.sort_unstable();
        for (_, extent) in order {
            let visits = &mut self.extents[extent as usize].visits;
            let last = visits.last().map(|&visit| &mut self.visits[visit as usize]);
            match last {
                Some(visit) if visit.last + CLOSE_BY >= step && visit.last >= self.since => {
                    visit.last = step;
                }
                _ => {
                    visits.push(self.visits.len() as u32);
                    self.visits.push(Visit { extent, first: step, last: step });
                }
            }
        }
    }

    fn extent(&mut self, file: u32, number: u64, bytes: Range<u64>) -> u32 {
        let next = self.extents.len() as u32;
        let index = *self.numbers.entry((file, number)).or_insert(next);
        match self.extents.get_mut(index as usize) {
            Some(Extent { bytes: known, .. }) => {
                *known = known.start.min(bytes.start)..known.end.max(bytes.end);
            }
            None => self.extents.push(Extent { file, bytes, visits: Vec::new() }),
        }
        index
    }

    /// How many steps there are.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The step that needs the most room at once, and how many bytes that is.
    pub fn largest(&self) -> (usize, u64) {
        (self.largest.0, self.largest.1 as u64 * self.extent_bytes)
    }

    /// Bytes of a spool that holds everything.
    pub fn room(&self) -> u64 {
        self.extents.len() as u64 * self.extent_bytes
    }

    /// Bytes that are fetched through a spool of `spool` bytes at the most.
    pub fn fetched(&self, spool: u64) -> u64 {
        let bytes = |extent: &Extent| extent.bytes.end - extent.bytes.start;
        if self.room() <= spool {
            return self.extents.iter().map(bytes).sum();
        }
        self.visits.iter().map(|visit| bytes(&self.extents[visit.extent as usize])).sum()
    }

    /// The next visit of an extent from `step` on, and its first step from there.
    fn next_visit(&self, extent: u32, step: usize) -> Option<(u32, usize)> {
        let visits = self.extents[extent as usize].visits.iter();
        let mut visits = visits.map(|&number| (number, self.visits[number as usize]));
        let (number, visit) = visits.find(|(_, visit)| visit.last >= step)?;
        Some((number, visit.first.max(step)))
    }
}

/// What is to be fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Its number, to name it by.
    pub extent: u32,
    /// Which file, as the steps call it.
    pub file: u32,
    /// Which bytes of that.
    pub bytes: Range<u64>,
}

/// The spool.
#[derive(Debug)]
pub struct Spool {
    file: File,
    folder: PathBuf,
    needs: Needs,
    slots: u64,
    state: Mutex<State>,
    /// Something came, for those who read.
    came: Condvar,
    /// There is something to fetch, or room for it.
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Steps before this one are over, and those others.
    over: usize,
    over_later: BTreeSet<usize>,
    /// The visit that is to be fetched for next.
    next: usize,
    /// Extents that a read waits for and nobody fetches.
    wanted: VecDeque<u32>,
    /// Extents that have a slot, or are waited for.
    held: BTreeMap<u32, Held>,
    free: Vec<u32>,
    fetched: u64,
    begun: bool,
    stopped: bool,
}

#[derive(Debug, Default)]
struct Held {
    slot: Option<u32>,
    came: bool,
    /// How many reads use it or wait for it.
    users: usize,
}

impl Held {
    /// Its slot, if that can be given to another.
    fn spare(&self) -> Option<u32> {
        self.slot.filter(|_| self.came && self.users == 0)
    }
}

impl Spool {
    /// Creates a spool of at most `bytes` in a directory.
    pub fn create(folder: &Path, bytes: u64, needs: Needs) -> Result<Self> {
        let failed = |doing: &str, error: Errno| {
            Error::io(doing, error.into())
                .file(folder)
                .advice("name a directory with more room, or a smaller spool (`--spool`)")
        };
        let file = unnamed(folder).map_err(|error| failed("create the spool", error))?;
        let slots = (bytes / needs.extent_bytes).clamp(1, needs.extents.len().max(1) as u64);
        let size = slots * needs.extent_bytes;
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
            Err(error) => return Err(failed("reserve room for the spool", error)),
        }
        let free = (0..slots as u32).rev().collect();
        let state = Mutex::new(State { free, ..State::default() });
        let (came, freed) = (Condvar::new(), Condvar::new());
        Ok(Self { file, folder: folder.to_owned(), needs, slots, state, came, freed })
    }

    /// Lets fetching begin: by now it is known which steps an earlier run has made.
    pub fn begin(&self) {
        self.lock().begun = true;
        self.freed.notify_all();
    }

    /// What is to be fetched next, when there is room for it, from when that may begin; nothing when
    /// the work is over.
    pub fn next(&self) -> Option<Fetch> {
        let mut state = self.lock();
        loop {
            if state.stopped || state.over == self.needs.steps {
                return None;
            }
            let chosen = if state.begun { state.choose(&self.needs) } else { None };
            if let Some(extent) = chosen {
                let Extent { file, bytes, .. } = self.needs.extents[extent as usize].clone();
                return Some(Fetch { extent, file, bytes });
            }
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Puts `bytes` in, which begin at `start` of the file that an extent belongs to. Fails when nobody
    /// wants them any more.
    pub fn put(&self, extent: u32, start: u64, bytes: &[u8]) -> Result<()> {
        let slot = self.coming(extent, start, bytes.len())?;
        self.lock().fetched += bytes.len() as u64;
        self.file.write_all_at(bytes, self.place(slot, start)).map_err(|error| {
            Error::io("write to the spool", error)
                .file(&self.folder)
                .advice("make room on its disk, or name another directory")
        })
    }

    /// The bytes of an extent from `start` on that fill `memory`, which were put in before.
    pub fn peek(&self, extent: u32, start: u64, memory: &mut [u8]) -> Result<()> {
        let slot = self.coming(extent, start, memory.len())?;
        read_exact_at(&self.file, self.place(slot, start), memory)
            .map_err(|error| error.file(&self.folder))
    }

    /// The slot of an extent that is being fetched, if these bytes lie in it.
    fn coming(&self, extent: u32, start: u64, length: usize) -> Result<u32> {
        let misplaced = || Error::internal("bytes were fetched that were not asked for");
        let known = &self.needs.extents.get(extent as usize).ok_or_else(misplaced)?.bytes;
        let end = start.checked_add(length as u64).ok_or_else(misplaced)?;
        if start < known.start || end > known.end {
            return Err(misplaced());
        }
        let state = self.lock();
        if state.stopped {
            return Err(stopped());
        }
        let coming = state.held.get(&extent).filter(|held| !held.came);
        coming.and_then(|held| held.slot).ok_or_else(misplaced)
    }

    /// All bytes of an extent were put in.
    pub fn arrived(&self, extent: u32) {
        let mut state = self.lock();
        if let Some(held) = state.held.get_mut(&extent) {
            held.came = true;
        }
        state.let_go(&self.needs, extent);
        drop(state);
        self.came.notify_all();
        self.freed.notify_all();
    }

    /// Ends all waiting: the work is over, or failed.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.came.notify_all();
        self.freed.notify_all();
    }

    /// Bytes that were fetched.
    pub fn fetched(&self) -> u64 {
        self.lock().fetched
    }

    /// Bytes that are fetched at the most.
    pub fn to_fetch(&self) -> u64 {
        self.needs.fetched(self.slots * self.needs.extent_bytes)
    }

    /// Fills `memory` with the bytes of a file from `start` on; waits for them.
    pub fn read(&self, file: u32, start: u64, mut memory: &mut [u8]) -> Result<()> {
        let mut at = start;
        while !memory.is_empty() {
            let number = at / self.needs.extent_bytes;
            let left = (number + 1) * self.needs.extent_bytes - at;
            let (now, rest) = memory.split_at_mut(memory.len().min(left as usize));
            let extent = self.needs.numbers.get(&(file, number)).copied();
            let end = at + now.len() as u64;
            let extent = extent.filter(|&extent| {
                let bytes = &self.needs.extents[extent as usize].bytes;
                bytes.start <= at && end <= bytes.end
            });
            let extent = extent.ok_or_else(|| {
                Error::internal("a part of a remote file is read that the plan does not name")
            })?;
            let slot = self.wait_for(extent)?;
            let outcome = read_exact_at(&self.file, self.place(slot, at), now)
                .map_err(|error| error.file(&self.folder));
            let mut state = self.lock();
            if let Some(held) = state.held.get_mut(&extent) {
                held.users -= 1;
            }
            state.let_go(&self.needs, extent);
            drop(state);
            self.freed.notify_all();
            outcome?;
            (at, memory) = (end, rest);
        }
        Ok(())
    }

    /// Steps are over: what only they needed makes room.
    pub fn finished(&self, steps: Range<usize>) {
        let mut state = self.lock();
        let before = state.over;
        state.over_later.extend(steps.start.max(before)..steps.end);
        while state.over_later.first() == Some(&state.over) {
            state.over_later.pop_first();
            state.over += 1;
        }
        if state.over > before {
            let held: Vec<u32> = state.held.keys().copied().collect();
            held.into_iter().for_each(|extent| state.let_go(&self.needs, extent));
            drop(state);
            self.freed.notify_all();
        }
    }

    /// Waits for an extent; its slot, which stays until the user is counted off.
    fn wait_for(&self, extent: u32) -> Result<u32> {
        let mut state = self.lock();
        let is_new = !state.held.contains_key(&extent);
        let held = state.held.entry(extent).or_default();
        held.users += 1;
        if is_new {
            state.wanted.push_back(extent);
            self.freed.notify_all();
        }
        loop {
            if state.stopped {
                return Err(stopped());
            }
            let slot = state.held.get(&extent).filter(|held| held.came).and_then(|held| held.slot);
            if let Some(slot) = slot {
                return Ok(slot);
            }
            state = self.came.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Where byte `at` of a file is in a slot.
    fn place(&self, slot: u32, at: u64) -> u64 {
        u64::from(slot) * self.needs.extent_bytes + at % self.needs.extent_bytes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The extent to fetch next, which now has a slot.
    fn choose(&mut self, needs: &Needs) -> Option<u32> {
        // What was there and had to go does not come in its turn any more. And what the oldest step
        // waits for has to come where there is no room for a turn, or nothing would go on.
        let next = self.next;
        self.choose_wanted(needs, |visit, _| visit < next)
            .or_else(|| self.choose_in_turn(needs))
            .or_else(|| self.choose_wanted(needs, |_, is_oldest| is_oldest))
    }

    /// The same, of what a read waits for: if by its next visit, and whether that is of the oldest
    /// step, it `is_due`.
    fn choose_wanted(
        &mut self,
        needs: &Needs,
        is_due: impl Fn(usize, bool) -> bool,
    ) -> Option<u32> {
        for at in 0..self.wanted.len() {
            let extent = self.wanted[at];
            let (visit, step) = needs.next_visit(extent, self.over).unwrap_or((0, self.over));
            let is_oldest = step == self.over;
            if !is_due(visit as usize, is_oldest) {
                continue;
            }
            if let Some(slot) = self.slot(needs, (!is_oldest).then_some(step)) {
                self.wanted.remove(at);
                self.held.entry(extent).or_default().slot = Some(slot);
                return Some(extent);
            }
        }
        None
    }

    /// The same, of what comes in its turn.
    fn choose_in_turn(&mut self, needs: &Needs) -> Option<u32> {
        while let Some(visit) = needs.visits.get(self.next) {
            let is_here = self.held.get(&visit.extent).is_some_and(|held| held.slot.is_some());
            if self.is_wanted(visit) && !is_here {
                let slot = self.slot(needs, Some(visit.first))?;
                self.wanted.retain(|&wanted| wanted != visit.extent);
                self.held.entry(visit.extent).or_default().slot = Some(slot);
                self.next += 1;
                return Some(visit.extent);
            }
            self.next += 1;
        }
        None
    }

    /// Whether a step of a visit is not over.
    fn is_wanted(&self, visit: &Visit) -> bool {
        let first = visit.first.max(self.over);
        first <= visit.last
            && self.over_later.range(first..=visit.last).count() <= visit.last - first
    }

    /// A slot: a free one, or that of the extent that is needed last, if it is needed later than
    /// `step`.
    fn slot(&mut self, needs: &Needs, step: Option<usize>) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        let spare = self.held.iter().filter(|(_, held)| held.spare().is_some());
        let needed = |(&extent, _): (&u32, _)| {
            (needs.next_visit(extent, self.over).map_or(usize::MAX, |(_, step)| step), extent)
        };
        let (next, extent) = spare.map(needed).max()?;
        if step.is_some_and(|step| next <= step) {
            return None;
        }
        self.held.remove(&extent)?.slot
    }

    /// Frees the slot of an extent that no step needs any more.
    fn let_go(&mut self, needs: &Needs, extent: u32) {
        let slot = self.held.get(&extent).and_then(Held::spare);
        if let Some(slot) = slot.filter(|_| needs.next_visit(extent, self.over).is_none()) {
            self.held.remove(&extent);
            self.free.push(slot);
        }
    }
}

/// A new file without a name in `folder`.
fn unnamed(folder: &Path) -> Result<File, Errno> {
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(folder, flags | OFlags::TMPFILE, mode) {
        Ok(file) => return Ok(File::from(file)),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {}
        Err(error) => return Err(error),
    }
    // For a file system that makes no such files; in between it is empty.
    let path = folder.join(format!(".oxmerge-spool-{}", std::process::id()));
    let file = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode)?;
    rustix::fs::unlinkat(CWD, &path, AtFlags::empty())?;
    Ok(File::from(file))
}

#[cold]
fn stopped() -> Error {
    Error::new(ErrorKind::Interrupted, "what is fetched is not wanted any more")
}
