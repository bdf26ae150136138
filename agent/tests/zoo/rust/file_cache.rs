//! A cache of at most 200 open files, the least recently used of which is closed. Its 260 files are asked for at
//! random, five a second, so it fills ever more slowly.

mod common;

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, Read, Seek},
    thread,
};

use common::{Random, Result, end_after_argument};

const FILES: u32 = 260;
const CAP: usize = 200;
const PER_SECOND: f64 = 5.0;

fn main() -> Result<()> {
    end_after_argument()?;
    for key in 0..FILES {
        fs::write(path(key), "content")?;
    }
    let mut random = Random(1);
    let mut cache = Cache::default();
    loop {
        let key = (random.uniform() * f64::from(FILES)) as u32;
        cache.read(key)?;
        thread::sleep(random.until_next(PER_SECOND));
    }
}

fn path(key: u32) -> String {
    format!("{key}.data")
}

/// The most recently used at the back.
#[derive(Default)]
struct Cache(VecDeque<(u32, File)>);

impl Cache {
    fn read(&mut self, key: u32) -> io::Result<String> {
        let found = self.0.iter().position(|(cached, _)| *cached == key);
        let mut file = match found.and_then(|index| self.0.remove(index)) {
            Some((_, file)) => file,
            None => File::open(path(key))?,
        };
        let mut content = String::new();
        file.rewind()?;
        file.read_to_string(&mut content)?;
        self.0.push_back((key, file));
        if self.0.len() > CAP {
            self.0.pop_front();
        }
        Ok(content)
    }
}
