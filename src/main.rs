//! The program: see `dynabase --help`.

use std::process::ExitCode;

/// glibc's allocator keeps the memory of a connection storm for ever; this one gives it back.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    dynabase::cli::run()
}
