//! The `plumb` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    plumb::cli::main()
}
