//! A server to whom 150 clients connect at once and stay. Beside them two short visits a second.

mod common;

use std::{
    env,
    io::{self, Write},
    net::{TcpListener, TcpStream},
    process::Command,
    thread,
    time::Duration,
};

use common::{Result, end_after_argument};
use rustix::process::{Signal, set_parent_process_death_signal};

const IDLE: usize = 150;

fn main() -> Result<()> {
    end_after_argument()?;
    if let Some(address) = env::args().nth(2) {
        return Ok(visit(&address)?);
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let seconds = env::args().nth(1).unwrap_or_default();
    Command::new(env::current_exe()?).args([seconds, listener.local_addr()?.to_string()]).spawn()?;
    let accept = |_| Ok(listener.accept()?.0);
    let _idle: Vec<TcpStream> = (0..IDLE).map(accept).collect::<io::Result<_>>()?;
    for visitor in listener.incoming() {
        // Until it closes.
        io::copy(&mut visitor?, &mut io::sink())?;
    }
    Ok(())
}

fn visit(address: &str) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let connect = |_| TcpStream::connect(address);
    let _idle: Vec<TcpStream> = (0..IDLE).map(connect).collect::<io::Result<_>>()?;
    loop {
        let mut visit = TcpStream::connect(address)?;
        visit.write_all(b"hello")?;
        thread::sleep(Duration::from_millis(200));
        drop(visit);
        thread::sleep(Duration::from_millis(300));
    }
}
