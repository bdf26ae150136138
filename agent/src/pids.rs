//! How many more threads a process may start before the pids controller of a cgroup, its own or one above, refuses.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

/// Text read of one file at most, in bytes.
const LIMIT: u64 = 16 << 10;
/// Cgroups looked at from its own upwards.
const MAX_DEPTH: usize = 32;

/// The least room of all cgroups that count it; `None` when none has a limit, or none can be read. `proc` is /proc and
/// `cgroups` /sys/fs/cgroup.
#[must_use]
pub(crate) fn room(proc: &Path, cgroups: &Path, tgid: u32) -> Option<u64> {
    let text = read(&proc.join(tgid.to_string()).join("cgroup"))?;
    // Version 1 has a hierarchy of its own for pids; where it has not, version 2 counts.
    let path = |wanted: fn(&str) -> bool| {
        text.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let controllers = parts.next()?;
            wanted(controllers).then(|| parts.next()).flatten()
        })
    };
    let of_v1 = path(|controllers| controllers.split(',').any(|name| name == "pids"));
    let (root, path) = match of_v1 {
        Some(path) => (cgroups.join("pids"), path),
        None => (cgroups.to_owned(), path(str::is_empty)?),
    };
    // `..` is a cgroup outside the namespace of the agent: not to be looked for below the root.
    let below = Path::new(path.trim_start_matches('/'));
    if below.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
        return None;
    }
    let mut folder: PathBuf = root.join(below);
    let mut least = None;
    for _ in 0..MAX_DEPTH {
        let number = |name| read(&folder.join(name))?.trim().parse::<u64>().ok();
        // `max` is no number, and the root has no such file.
        if let (Some(max), Some(current)) = (number("pids.max"), number("pids.current")) {
            let room = max.saturating_sub(current);
            least = Some(least.map_or(room, |least: u64| least.min(room)));
        }
        if folder == root || !folder.pop() {
            break;
        }
    }
    least
}

fn read(path: &Path) -> Option<String> {
    let mut text = String::new();
    fs::File::open(path).ok()?.take(LIMIT).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_room_of_all_cgroups_above_counts_in_either_version() {
        let root = std::env::temp_dir().join(format!("plumb-pids-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/1/cgroup", "0::/a.slice/b.service\n");
        write("proc/2/cgroup", "4:cpu:/x\n3:pids,misc:/a.slice\n0::/a.slice/b.service\n");
        write("proc/3/cgroup", "0::/../../other\n");
        write("proc/4/cgroup", "0::/none\n");
        write("cgroup/a.slice/pids.max", "100\n");
        write("cgroup/a.slice/pids.current", "90\n");
        write("cgroup/a.slice/b.service/pids.max", "max\n");
        write("cgroup/a.slice/b.service/pids.current", "20\n");
        write("cgroup/pids/a.slice/pids.max", "50\n");
        write("cgroup/pids/a.slice/pids.current", "60\n");
        let room = |tgid| room(&root.join("proc"), &root.join("cgroup"), tgid);
        assert_eq!((room(1), room(2), room(3), room(4), room(5)), (Some(10), Some(0), None, None, None));
        fs::remove_dir_all(&root).unwrap();
    }
}
