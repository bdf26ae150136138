//! The registrations of processes, kept over a restart of the agent.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::service::Service;
use crate::state;

const NAME: &str = "services.json";
/// The file is this long at most, in bytes.
const LIMIT: u64 = 4 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    boot_id: String,
    services: Vec<Service>,
}

#[derive(Serialize)]
struct Written<'a> {
    boot_id: &'a str,
    services: &'a [&'a Service],
}

/// Writes all, or leaves what was there.
pub(super) fn save(folder: &Path, boot_id: &str, services: &[&Service]) -> io::Result<()> {
    state::replace(folder, NAME, &serde_json::to_vec(&Written { boot_id, services })?)
}

/// What was saved since this boot; nothing when that cannot be read.
pub(super) fn load(folder: &Path, boot_id: &str) -> Vec<Service> {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let Ok(file) = options.open(folder.join(NAME)) else { return Vec::new() };
    let mut bytes = Vec::new();
    let read = file.take(LIMIT).read_to_end(&mut bytes).map_err(serde_json::Error::io);
    match read.and_then(|_| serde_json::from_slice::<Kept>(&bytes)) {
        Ok(saved) if saved.boot_id == boot_id => saved.services,
        Ok(_) => Vec::new(),
        Err(error) => {
            let path = folder.join(NAME);
            tracing::warn!("registrations of an agent before are lost: {}: {error}", path.display());
            Vec::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn registrations_are_kept_for_this_boot_and_nonsense_is_nothing() {
        let folder = std::env::temp_dir().join(format!("plumb-registrations-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let service = Service::example("a");
        save(&folder, "boot", &[&service]).unwrap();
        assert_eq!(load(&folder, "boot"), [service]);
        assert!(load(&folder, "another").is_empty());
        fs::write(folder.join(NAME), "{").unwrap();
        assert!(load(&folder, "boot").is_empty());
        fs::remove_dir_all(&folder).unwrap();
    }
}
