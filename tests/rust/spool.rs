//! What is read through a spool is what the files have, however small it is.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::thread;

use oxmerge::error::ErrorKind;
use oxmerge::io::{Needs, Spool};
use proptest::prelude::*;

const KIB: u64 = 1 << 10;
/// The least that an extent has.
const EXTENT: u64 = 64 * KIB;

/// The byte of a file at a place.
fn byte(file: u32, at: u64) -> u8 {
    ((at ^ (u64::from(file) << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn bytes(file: u32, range: Range<u64>) -> Vec<u8> {
    range.map(|at| byte(file, at)).collect()
}

type Step = Vec<(u32, Range<u64>)>;

fn needs(spool: u64, steps: &[Step]) -> Needs {
    let mut needs = Needs::new(spool, 0);
    steps.iter().for_each(|step| needs.add_step(step));
    needs
}

/// Fetches until nothing more is wanted; how many bytes of each place were fetched.
fn fetch(spool: &Spool, counts: &Mutex<BTreeMap<(u32, u64), usize>>) {
    while let Some(fetch) = spool.next() {
        let content = bytes(fetch.file, fetch.bytes.clone());
        for (at, piece) in (fetch.bytes.start..).step_by(7000).zip(content.chunks(7000)) {
            if spool.put(fetch.extent, at, piece).is_err() {
                return;
            }
        }
        *counts.lock().unwrap().entry((fetch.file, fetch.bytes.start / EXTENT)).or_default() += 1;
        spool.arrived(fetch.extent);
    }
}

/// Runs `steps` on some workers, as the engine does: in order, several at a time, each step read
/// `passes` times. How often each extent was fetched.
fn run(steps: &[Step], room: u64, workers: usize, passes: usize) -> BTreeMap<(u32, u64), usize> {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::create(folder.path(), room, needs(room, steps)).unwrap();
    spool.begin();
    let (next, counts) = (Mutex::new(0), Mutex::default());
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| fetch(&spool, &counts));
        }
        let work = || {
            loop {
                let step = {
                    let mut next = next.lock().unwrap();
                    *next += 1;
                    *next - 1
                };
                let Some(reads) = steps.get(step) else { return };
                for (file, range) in reads.iter().cycle().take(reads.len() * passes) {
                    let mut memory = vec![0; (range.end - range.start) as usize];
                    spool.read(*file, range.start, &mut memory).unwrap();
                    assert!(memory == bytes(*file, range.clone()), "{file} {range:?}");
                }
                spool.finished(step..step + 1);
            }
        };
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
    // Without a name from the beginning, so nothing is left.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    counts.into_inner().unwrap()
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let read = (0..3u32, 0..600 * KIB, 0..200 * KIB)
        .prop_map(|(file, start, length)| (file, start..start + length));
    prop::collection::vec(prop::collection::vec(read, 0..4), 1..30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any order, any room: also less than a step needs, which only costs fetches.
    #[test]
    fn every_read_gets_its_bytes(
        steps in steps(),
        slots in 1..20u64,
        workers in 1..5usize,
        passes in 1..3usize,
    ) {
        run(&steps, slots * EXTENT, workers, passes);
    }

    #[test]
    fn with_room_for_all_each_byte_is_fetched_once(steps in steps(), workers in 1..5usize) {
        let room = needs(1, &steps).room().max(EXTENT);
        let counts = run(&steps, room, workers, 2);
        prop_assert!(counts.values().all(|&count| count == 1), "{counts:?}");
    }
}

#[test]
fn in_order_a_small_spool_fetches_each_byte_once() {
    // Forty tensors of two models, one after the other, and a head that is the first one again.
    let mut steps: Vec<Step> = (0..40)
        .map(|step| (0..2).map(|file| (file, step * EXTENT..(step + 1) * EXTENT)).collect())
        .collect();
    let counts = run(&steps, 8 * EXTENT, 3, 2);
    assert_eq!(counts.len(), 80);
    assert!(counts.values().all(|&count| count == 1), "{counts:?}");
    // What is needed again much later is fetched again for it, and nothing else is.
    steps.push(vec![(0, 0..EXTENT)]);
    steps.splice(1..1, (0..100).map(|_| Vec::new()));
    let counts = run(&steps, 8 * EXTENT, 3, 2);
    assert!(counts.iter().all(|(place, &count)| count <= 1 + usize::from(*place == (0, 0))));
}

#[test]
fn a_step_that_needs_more_than_the_spool_is_known_in_advance() {
    let steps = vec![vec![(0, 0..EXTENT)], vec![(0, 10..5 * EXTENT), (1, 0..1)], vec![]];
    assert_eq!(needs(1, &steps).largest(), (1, 6 * EXTENT));
    assert_eq!(needs(1, &steps).fetched(6 * EXTENT), 5 * EXTENT + 1);
}

#[test]
fn however_large_the_files_extents_are_few() {
    let mut needs = Needs::new(1, 1 << 60);
    needs.add_step(&[(0, 0..1 << 60)]);
    assert!(needs.room() >= 1 << 60);
    assert_eq!(needs.fetched(u64::MAX), 1 << 60);
}

#[test]
fn what_is_over_before_the_work_begins_is_not_fetched() {
    let folder = tempfile::tempdir().unwrap();
    // Each step reads an extent of its own, and all but the first a part of the one before.
    let read = |step: u64| vec![(0, (step * EXTENT).saturating_sub(9)..(step + 1) * EXTENT)];
    let steps: Vec<Step> = (0..10).map(read).collect();
    let spool = Spool::create(folder.path(), 20 * EXTENT, needs(20 * EXTENT, &steps)).unwrap();
    let fetched = thread::scope(|scope| {
        let fetched = scope.spawn(|| {
            let each = std::iter::from_fn(|| spool.next()).take(5);
            each.map(|fetch| fetch.bytes.start / EXTENT).collect::<Vec<_>>()
        });
        for over in [5..8, 0..3, 9..10] {
            spool.finished(over);
        }
        spool.begin();
        fetched.join().unwrap()
    });
    // Steps 3, 4 and 8 are left, which also read the ends of the extents before theirs.
    assert_eq!(fetched, [2, 3, 4, 7, 8]);
}

#[test]
fn who_waits_is_woken_when_fetching_stops() {
    let folder = tempfile::tempdir().unwrap();
    let steps = vec![vec![(0, 0..10 * EXTENT)]];
    let spool = Spool::create(folder.path(), 2 * EXTENT, needs(2 * EXTENT, &steps)).unwrap();
    spool.begin();
    thread::scope(|scope| {
        let read = scope.spawn(|| spool.read(0, 0, &mut [0; 10]).unwrap_err().kind());
        let first = spool.next().unwrap();
        spool.put(first.extent, first.bytes.start, &[1]).unwrap();
        // The second slot, and then there is no room: the others wait.
        spool.next().unwrap();
        let next = scope.spawn(|| spool.next());
        spool.stop();
        assert_eq!(read.join().unwrap(), ErrorKind::Interrupted);
        assert_eq!(next.join().unwrap(), None);
        assert!(spool.put(first.extent, first.bytes.start, &[1]).is_err());
    });
}

#[test]
fn bytes_that_were_not_asked_for_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::create(folder.path(), EXTENT, needs(EXTENT, &[vec![(0, 5..9)]])).unwrap();
    spool.begin();
    assert!(spool.put(0, 5, &[0; 4]).is_err(), "nobody fetches it");
    let fetch = spool.next().unwrap();
    assert_eq!((fetch.file, fetch.bytes), (0, 5..9));
    for (extent, start, count) in [(0, 4, 2), (0, 5, 5), (1, 5, 1), (0, u64::MAX, 2)] {
        let refused = spool.put(extent, start, &vec![0; count]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Internal);
    }
    spool.put(0, 5, &[1, 2, 3, 4]).unwrap();
    spool.arrived(0);
    let mut read = [0; 2];
    spool.read(0, 6, &mut read).unwrap();
    assert_eq!(read, [2, 3]);
    assert_eq!(spool.read(0, 8, &mut read).unwrap_err().kind(), ErrorKind::Internal);
    assert_eq!(spool.read(1, 5, &mut read).unwrap_err().kind(), ErrorKind::Internal);
}
