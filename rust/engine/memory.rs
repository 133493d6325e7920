//! The memory budget: how large a piece may be so that the peak stays below it.
//!
//! The peak is the high-water mark of the whole process's resident set. It is made of what was
//! there before (interpreter, modules), the state of the passes (a histogram for each selection,
//! block sums), and for each worker the piece in hand: the pages of every input and the output
//! buffer. The first two follow from the plan ([`Need`]); what is left is shared by the workers.

use std::fs;

use rustix::process::{Resource, getrlimit};

use super::need::{Amount, Held, Need, Offload};
use crate::error::{Error, ErrorKind, Result};

/// Stack, allocator and scheduler, a worker and in all. Measured, rounded up.
const WORKER_OVERHEAD: u64 = 64 << 10;
const ENGINE_OVERHEAD: u64 = 1 << 20;
/// Bytes of inputs and outputs of small neighbours that are one unit, at the most, and at the least.
const GROUP_BYTES: u64 = 1 << 20;
const LEAST_GROUP: u64 = 64 << 10;
/// What a budget that is refused is told to be larger than needed, and one part in how many than what
/// planning took: what a process has resident before the engine starts is not quite the same each
/// time, and its peak differs more, the more tensors there are.
const REFUSAL_SLACK: u64 = 1 << 20;
const PLANNING_SLACK: u64 = 8;
/// Addresses that a thread takes: its stack, and what the C library sets aside for its allocations.
const THREAD_ADDRESSES: u64 = (64 << 20) + (4 << 20);
/// Addresses that stay free. An allocation that fails in Rust's own collections ends the process.
const FREE_ADDRESSES: u64 = 64 << 20;

/// How a run keeps within its budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The budget asked for, bytes.
    pub budget: u64,
    /// Resident before the engine starts.
    pub baseline: u64,
    /// Predicted high-water mark.
    pub predicted: u64,
    /// Threads.
    pub workers: usize,
    /// Bytes a worker may hold of pieces.
    pub worker_bytes: u64,
    /// `worker_bytes` with what computing elsewhere takes beside it.
    pub(crate) with_offload: u64,
    /// Bytes left over, for random masks and keys that are kept between passes.
    pub kept_room: u64,
    /// The same, for outputs that are computed ahead.
    pub held_room: u64,
    /// Bytes that a worker may hold of small neighbours, beside the piece in hand.
    pub(crate) group_bytes: u64,
    /// Bytes a worker may hold on its device.
    pub(crate) device_bytes: u64,
}

impl MemoryPlan {
    /// For tensors that are in memory already: nothing to divide.
    pub(crate) fn unbounded(workers: usize) -> Self {
        let all = u64::MAX;
        let fitting = addresses_left().map_or(all, |room| room / THREAD_ADDRESSES);
        let workers = workers.min(fitting.max(1) as usize);
        Self {
            budget: all,
            baseline: 0,
            predicted: 0,
            workers,
            worker_bytes: all,
            kept_room: all,
            held_room: 0,
            group_bytes: 0,
            with_offload: all,
            device_bytes: all,
        }
    }

    /// Divides `budget` among at most `workers` threads; `baseline` is resident already, and
    /// `planned` were for a moment while the merge was planned. Each need is that of so many
    /// tensors. So that no thread and no memory is asked for that cannot be had, it also keeps
    /// within what the process may still map (`ulimit -v`).
    ///
    /// Uses fewer threads before it refuses; refuses with the number that would do.
    pub fn new(
        needs: &[(Need, usize)],
        budget: u64,
        workers: usize,
        baseline: u64,
        planned: u64,
    ) -> Result<Self> {
        let plan = Self::divide(needs, budget, workers, baseline, planned)?;
        let Some(room) = addresses_left() else { return Ok(plan) };
        let within = |workers: usize| {
            let left = room.checked_sub(addresses_of(workers))?;
            Self::divide(needs, budget.min(baseline + left), workers, baseline, 0).ok()
        };
        let plan = (1..=plan.workers).rev().find_map(within).ok_or_else(|| limited(room))?;
        Ok(Self { budget, ..plan })
    }

    fn divide(
        needs: &[(Need, usize)],
        budget: u64,
        workers: usize,
        baseline: u64,
        planned: u64,
    ) -> Result<Self> {
        let most = |of: fn(&Need) -> Amount| {
            let amounts = needs.iter().map(|(need, _)| of(need));
            amounts.max_by_key(|amount| amount.most).unwrap_or_default()
        };
        let worker = Amount::certain(WORKER_OVERHEAD).plus(most(|need| need.worker_state), 1);
        let shared = Amount::certain(baseline + ENGINE_OVERHEAD);
        let fixed = |workers: u64| {
            let states = largest_states(needs, workers as usize);
            shared.plus(states, 1).plus(worker, workers)
        };
        let offload = needs.iter().find_map(|(need, _)| need.offload);
        let device_share =
            |workers| offload.map_or(u64::MAX, |offload| offload.for_each_of(workers));
        let block = most(|need| need.piece(1).plus(need.beside(1), 1)).most;
        let device_block = needs.iter().map(|(need, _)| need.device(1)).max().unwrap_or(0);
        let fits = |workers: &u64| {
            let in_memory = planned.max(fixed(*workers).most + workers * block) <= budget;
            in_memory && device_block <= device_share(*workers)
        };
        let Some(workers) = (1..=workers.max(1) as u64).rev().find(fits) else {
            return Err(match offload {
                Some(Offload { vram, .. }) if vram < device_block => {
                    refused("the device memory", "vram", vram, device_block)
                }
                _ => {
                    let needed = fixed(1).most + block + REFUSAL_SLACK;
                    let needed = needed.max(planned + planned / PLANNING_SLACK);
                    refused("the memory budget", "memory", budget, needed)
                }
            });
        };
        let share = (budget - fixed(workers).most) / workers;
        let device_bytes = device_share(workers);
        let pieces = needs.iter().map(|(need, _)| {
            let blocks = need.blocks_within(share, device_bytes);
            (need.piece(blocks), need.beside(blocks))
        });
        let largest = |of: fn((Amount, Amount)) -> u64| pieces.clone().map(of).max().unwrap_or(0);
        let expected = largest(|(piece, beside)| piece.expected + beside.expected);
        let left_over = share - largest(|(piece, beside)| piece.most + beside.most).min(share);
        let group_bytes = group_bytes(needs, left_over);
        let kept_room = match offload {
            None => {
                let worker = largest(|(piece, _)| piece.most) + group_bytes;
                budget - fixed(workers).most - workers * worker
            }
            // Masks are drawn again there, keys counted, and inputs read again.
            Some(_) => 0,
        };
        let blocks = |need: &Need| need.blocks_within(share, device_bytes);
        let keys = largest_of(each_of(needs, KEPT_AT_ONCE, |need| need.kept), KEPT_AT_ONCE).most;
        let held = held_at_once(needs, workers as usize, blocks);
        let held_room = kept_room.saturating_sub(keys).min(held.most);
        let held = held.expected.min(held_room);
        let kept_room = kept_room - held_room;
        // Small neighbours lie partly where planning had its own.
        let worker = expected + group_bytes / 2;
        let sample = needs.iter().map(|(need, _)| need.sample()).max().unwrap_or(0);
        let pieces_held = (workers * worker).max(sample);
        Ok(Self {
            budget,
            baseline,
            predicted: fixed(workers).expected
                + pieces_held
                + held
                + kept_between_passes(needs, kept_room),
            workers: workers as usize,
            worker_bytes: largest(|(piece, _)| piece.most),
            with_offload: largest(|(piece, beside)| piece.most + beside.most),
            device_bytes,
            kept_room,
            held_room,
            group_bytes,
        })
    }

    /// Blocks in a piece of a tensor.
    pub(crate) fn piece_blocks(&self, need: &Need) -> u64 {
        need.blocks_within(self.with_offload, self.device_bytes)
    }
}

/// Of how many tensors there is room for what they keep before outputs are held: one that workers
/// finish, and others that are begun meanwhile.
const KEPT_AT_ONCE: usize = 3;

/// The largest `count` of some amounts together.
fn largest_of(mut amounts: Vec<Amount>, count: usize) -> Amount {
    amounts.sort_unstable_by_key(|amount| std::cmp::Reverse(amount.most));
    amounts.into_iter().take(count).fold(Amount::default(), |sum, amount| sum.plus(amount, 1))
}

/// How many tasks may be under way at once.
pub(crate) fn tasks_under_way(workers: usize) -> usize {
    workers + 2
}

/// What held outputs take: while one tensor is written, the next is computed, or several where one
/// has not a unit for each of `workers`; and room for what may be undecided in the units in hand.
fn held_at_once(needs: &[(Need, usize)], workers: usize, blocks: impl Fn(&Need) -> u64) -> Amount {
    let under_way = tasks_under_way(workers);
    let each = each_of(needs, under_way, |need| need.held(blocks(need)));
    let mut held: Vec<Held> = each.into_iter().flatten().collect();
    held.sort_unstable_by_key(|held| std::cmp::Reverse(held.expected));
    let units = held.first().map_or(1, |held| held.units as usize);
    let surplus = held.iter().map(|held| held.surplus).max().unwrap_or(0);
    let expected = held.iter().take(1 + workers.div_ceil(units)).map(|held| held.expected).sum();
    Amount::certain(expected).plus(Amount::uncertain(surplus), workers as u64)
}

/// The states of the tasks that may be under way at once.
fn largest_states(needs: &[(Need, usize)], workers: usize) -> Amount {
    let under_way = tasks_under_way(workers);
    largest_of(each_of(needs, under_way, |need| need.shared_state), under_way)
}

/// What is kept at once, of what there is room for: while workers finish one tensor, others begin
/// the next.
fn kept_between_passes(needs: &[(Need, usize)], room: u64) -> u64 {
    let mut kept: Vec<Amount> = each_of(needs, 2, |need| need.kept);
    kept.sort_unstable_by_key(|kept| std::cmp::Reverse(kept.most));
    let within_room = kept.into_iter().scan(room, |left, kept| {
        let fits = kept.most <= *left;
        *left -= if fits { kept.most } else { 0 };
        Some(if fits { kept.expected } else { 0 })
    });
    within_room.filter(|&kept| kept > 0).take(2).sum()
}

/// `of` each need as often as there are tensors that have it, up to `most` times.
fn each_of<R: Clone>(needs: &[(Need, usize)], most: usize, of: impl Fn(&Need) -> R) -> Vec<R> {
    let each = needs.iter().map(|(need, count)| std::iter::repeat_n(of(need), *count.min(&most)));
    each.flatten().collect()
}

/// What a worker may hold of small neighbours, of the `spare` bytes that pieces leave it: as much as
/// is read and written in one go, or nothing where there are none, or no room.
fn group_bytes(needs: &[(Need, usize)], spare: u64) -> u64 {
    let small = needs.iter().filter(|(need, _)| need.is_small());
    let bytes: u64 = small.map(|(need, count)| need.bytes() * *count as u64).sum();
    let fits = (spare / 2).min(GROUP_BYTES).min(bytes);
    if fits < LEAST_GROUP { 0 } else { fits }
}

/// `what` is told to be too small; `option` sets it, on the command line and in Python.
#[cold]
fn refused(what: &str, option: &str, allowed: u64, needed: u64) -> Error {
    let mebibytes = |bytes: u64| bytes.div_ceil(1 << 20);
    let (allowed, needed) = (mebibytes(allowed), mebibytes(needed));
    let message = format!("{what} is too small for one block of every input");
    Error::new(ErrorKind::Memory, message)
        .expected(format!("at least {needed} MiB"))
        .found(format!("{allowed} MiB"))
        .advice(format!(
            "allow more: `--{option} {needed}MiB`, or `{option}=\"{needed}MiB\"` in Python"
        ))
}

/// Bytes that this process may still map, where the system limits that.
fn addresses_left() -> Option<u64> {
    let limits = [(Resource::As, "VmSize:"), (Resource::Data, "VmData:")];
    let left = limits.into_iter().filter_map(|(limit, used)| {
        getrlimit(limit).current.map(|most| most.saturating_sub(status_bytes(used)))
    });
    left.min()
}

/// What so many threads may map besides their pieces.
fn addresses_of(threads: usize) -> u64 {
    FREE_ADDRESSES + threads as u64 * THREAD_ADDRESSES
}

/// An error if this process may not map what one more thread needs.
#[cfg(feature = "python")]
pub(crate) fn check_room_for_a_thread() -> Result<()> {
    match addresses_left() {
        Some(room) if room < addresses_of(1) => Err(limited(room)),
        _ => Ok(()),
    }
}

#[cold]
fn limited(room: u64) -> Error {
    Error::new(ErrorKind::Memory, "this process may not map the memory that one thread needs")
        .found(format!("{} MiB left of its limit", room >> 20))
        .advice("raise the limit (`ulimit -v`, `ulimit -d`), or remove it")
}

/// A number of KiB that the kernel reports about this process, in bytes.
fn status_bytes(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap_or_default();
    let number = line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
    number.unwrap_or(0) * 1024
}

/// Bytes of this process that are resident now.
pub fn resident() -> u64 {
    status_bytes("VmRSS:")
}

/// The most bytes of this process that were ever resident.
pub fn peak_resident() -> u64 {
    status_bytes("VmHWM:")
}
