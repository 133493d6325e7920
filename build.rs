//! Refuses to build where the engine cannot work, in words, before a hundred other errors do.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let target = |name: &str| env::var(format!("CARGO_CFG_TARGET_{name}")).unwrap_or_default();
    if target("OS") != "linux" {
        println!(
            "cargo::error=oxmerge runs on Linux only: it uses Linux's calls for direct and mapped \
             input and output, and for what lies in the page cache; on macOS and Windows use a \
             Linux virtual machine, container or WSL 2"
        );
    }
    if target("POINTER_WIDTH") != "64" {
        println!("cargo::error=oxmerge needs a 64-bit machine: checkpoints are larger than 4 GiB");
    }
    if target("ENDIAN") != "little" {
        println!(
            "cargo::error=oxmerge needs a little-endian machine: it computes on the bytes of \
             safetensors files as they are"
        );
    }
}
