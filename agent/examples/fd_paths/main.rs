//! One path by which an fd table or a thread group changes, each under a name.
//!
//! `fd_paths NAME` sets the stage, prints `ready`, and when a line comes in on stdin does exactly that. Then
//! it prints what changed, one claim a line (`opened PID FD`, `closed PID FD`, `forked PID CHILD`, …) or
//! `unsupported ERRNO`, and `ready` again; it ends when stdin is closed. `fd_paths --list` prints the names,
//! each with what it covers behind a tab.

mod compat;
mod create;
mod passing;
mod process;
mod seccomp;
mod sys;
mod table;
mod uring;

use std::{
    env,
    io::{self, BufRead, Write},
};

use sys::{Result, pid, sys};

/// One path.
struct Path {
    name: &'static str,
    covers: &'static str,
    run: fn(&mut Stage) -> Result<()>,
}

const fn path(name: &'static str, covers: &'static str, run: fn(&mut Stage) -> Result<()>) -> Path {
    Path { name, covers, run }
}

const GROUPS: [&[Path]; 7] = [
    create::PATHS,
    table::PATHS,
    process::PATHS,
    passing::PATHS,
    seccomp::PATHS,
    uring::PATHS,
    compat::PATHS,
];

/// What says that this kernel lacks something, of a system with all privileges.
const LACKS: [(i32, &str); 9] = [
    (libc::ENOSYS, "ENOSYS"),
    (libc::EINVAL, "EINVAL"),
    (libc::ENOTTY, "ENOTTY"),
    (libc::EOPNOTSUPP, "EOPNOTSUPP"),
    (libc::ENOPROTOOPT, "ENOPROTOOPT"),
    (libc::EPROTONOSUPPORT, "EPROTONOSUPPORT"),
    (libc::EAFNOSUPPORT, "EAFNOSUPPORT"),
    (libc::ENODEV, "ENODEV"),
    (libc::ENOENT, "ENOENT"),
];

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut paths = GROUPS.iter().copied().flatten();
    match words[..] {
        ["--list"] => {
            for path in paths {
                println!("{}\t{}", path.name, path.covers);
            }
            Ok(())
        }
        // A child that `process::spawn` has made; it says when its start is over.
        ["--pause", parent, said] => {
            let [parent, said] = [parent, said].map(|word| word.parse().map_err(io::Error::other));
            sys!(libc::SYS_write, said?, &raw const *b"\n", 1)?;
            sys::pause_with(parent?)
        }
        // What is left to do after an exec.
        ["--resume", ref claims @ ..] => {
            let claims = claims.iter().map(|claim| (*claim).to_owned()).collect();
            Stage { claims, begun: true }.finish()
        }
        [name] => {
            let path = paths.find(|path| path.name == name).ok_or_else(usage)?;
            let mut stage = Stage { claims: Vec::new(), begun: false };
            let lacks = match (path.run)(&mut stage) {
                Ok(()) => None,
                Err(error) => {
                    let known = LACKS.iter().find(|(errno, _)| error.raw_os_error() == Some(*errno));
                    Some(known.ok_or(error)?.1)
                }
            };
            if let Some(lacks) = lacks {
                if !stage.begun {
                    stage.begin()?;
                }
                stage.claims = vec![format!("unsupported {lacks}")];
            }
            stage.finish()
        }
        _ => Err(usage()),
    }
}

fn usage() -> io::Error {
    io::Error::other("usage: fd_paths NAME | --list")
}

/// What this process says about itself.
struct Stage {
    claims: Vec<String>,
    begun: bool,
}

impl Stage {
    /// Says that the stage is set, and waits until the path may be taken.
    fn begin(&mut self) -> Result<()> {
        self.begun = true;
        println!("ready");
        match io::stdin().lock().read_line(&mut String::new())? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    fn claim(&mut self, verb: &str, pid: i32, number: i32) {
        self.claims.push(claim(verb, pid, number));
    }

    /// A new fd of this process.
    fn opened(&mut self, fd: i32) {
        self.claim("opened", pid(), fd);
    }

    fn closed(&mut self, fd: i32) {
        self.claim("closed", pid(), fd);
    }

    /// Prints the claims and waits for the end. Ends the process from any thread, also where the leader has
    /// gone.
    fn finish(self) -> Result<()> {
        let mut stdout = io::stdout().lock();
        for claim in self.claims {
            writeln!(stdout, "{claim}")?;
        }
        writeln!(stdout, "ready")?;
        drop(stdout);
        while io::stdin().lock().read_line(&mut String::new())? > 0 {}
        sys!(libc::SYS_exit_group, 0).map(drop)
    }
}

fn claim(verb: &str, pid: i32, number: i32) -> String {
    format!("{verb} {pid} {number}")
}
