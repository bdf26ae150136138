//! Subscribes to a topic each second, with a thread that waits for its messages. Leaks them: the senders are
//! kept, so that no receiver ever ends.

mod common;

use std::{
    io,
    sync::mpsc::{self, Receiver, Sender},
    thread,
    time::Duration,
};

use common::{Result, end_after_argument};

fn main() -> Result<()> {
    end_after_argument()?;
    Ok(subscribe_all()?)
}

#[inline(never)]
fn subscribe_all() -> io::Result<()> {
    let mut topics = Vec::new();
    loop {
        topics.push(subscribe()?);
        thread::sleep(Duration::from_secs(1));
    }
}

#[inline(never)]
fn subscribe() -> io::Result<Sender<String>> {
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new().name("subscriber".to_owned()).spawn(move || print_all(&receiver))?; // leak
    Ok(sender)
}

fn print_all(messages: &Receiver<String>) {
    while let Ok(message) = messages.recv() {
        println!("{message}");
    }
}
