//! Readers and writers against plain files.
