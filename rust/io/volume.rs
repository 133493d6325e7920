//! What the file system under a path is like: remote or local, and how much room it has.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

/// Magic numbers of file systems whose bytes come from elsewhere, as `statfs` gives them. What is
/// known of local disks, such as when to read past the page cache, need not hold there.
const REMOTE: [u32; 12] = [
    0x6969,      // NFS
    0x517b,      // SMB
    0xff53_4d42, // CIFS
    0xfe53_4d42, // SMB2
    0x6573_5546, // FUSE, virtiofs
    0x0102_1997, // 9P
    0x00c3_6400, // Ceph
    0x0bd0_0bd0, // Lustre
    0x4750_4653, // GPFS
    0x1983_0326, // BeeGFS
    0x5346_414f, // AFS
    0x6b41_4653, // AFS in the kernel
];

/// Whether `file`, which may be a directory, lies on a network or FUSE mount. One that cannot be
/// asked counts as remote, for the positioned path works everywhere.
pub(super) fn is_remote(file: &impl AsFd) -> bool {
    rustix::fs::fstatfs(file).map_or(true, |volume| REMOTE.contains(&(volume.f_type as u32)))
}

/// Bytes that an ordinary user can still write to the disk that `file` is on.
pub(super) fn free_space(file: &File) -> io::Result<u64> {
    let volume = rustix::fs::fstatvfs(file)?;
    Ok(volume.f_bavail.saturating_mul(volume.f_frsize))
}

/// Lets the process open as many files as the system allows it: a merge of sharded models holds
/// hundreds open at once, and the usual soft limit is for programs that use `select`.
pub fn raise_open_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        // A wish: without it, opening says what is wrong.
        let _ = setrlimit(Resource::Nofile, limit);
    }
}
