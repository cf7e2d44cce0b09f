//! The folder of `dynabase dev`: marked as ours, used by one process at a time, its secrets readable by its owner only.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{ErrorKind, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{cli::place::DEV_CONFIG, tenant::OrgId};

/// In every folder we made. `--reset` wipes no other.
const MARKER: &str = ".dynabase-dev";

/// What is generated on the first start.
#[derive(Clone, Serialize, Deserialize)]
pub struct Secrets {
    /// Names and upstream passwords derive from it.
    pub root_secret: String,
    /// Signs development tokens.
    pub hs256_secret: String,
    /// Opens the admin port.
    pub admin_token: String,
    /// Of the private server's superuser.
    pub postgres_password: String,
}

/// A folder of ours, locked.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    /// Held while we run; the kernel lets go of it however we end.
    _lock: File,
}

impl Folder {
    /// Takes the folder, made if it is not there; `reset` empties it first.
    ///
    /// # Errors
    /// In words: it is not ours, another process has it, the system says no.
    pub fn open(path: &Path, reset: bool) -> Result<Self, String> {
        let io = |error: std::io::Error| format!("{}: {error}", path.display());
        fs::create_dir_all(path).map_err(io)?;
        let path = path.canonicalize().map_err(io)?;
        let marker = path.join(MARKER);
        let foreign = !marker.exists() && fs::read_dir(&path).map_err(io)?.next().is_some();
        if foreign {
            return Err(format!(
                "{} holds files that no `dynabase dev` made: choose another --data-dir",
                path.display()
            ));
        }
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&marker).map_err(io)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(format!("another `dynabase dev` is running in {}", path.display()));
            }
            Err(TryLockError::Error(error)) => return Err(io(error)),
        }
        if reset {
            empty(&path).map_err(io)?;
        }
        Ok(Self { path, _lock: lock })
    }

    /// Where it is, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration in it.
    pub fn config(&self) -> PathBuf {
        self.path.join(DEV_CONFIG)
    }

    /// The secrets, generated if there are none yet.
    ///
    /// # Errors
    /// In words.
    pub fn secrets(&self) -> Result<Secrets, String> {
        let path = self.path.join("secrets.json");
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|_| format!("{}: damaged; `dynabase dev --reset` begins anew", path.display())),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let secrets = Secrets {
                    root_secret: random()?,
                    hs256_secret: random()?,
                    admin_token: random()?,
                    postgres_password: random()?,
                };
                let json = serde_json::to_vec_pretty(&secrets).map_err(|error| error.to_string())?;
                write_private(&path, &json)?;
                Ok(secrets)
            }
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    /// The service key of a demo tenant, kept here in clear so that it can be shown again: for development only.
    ///
    /// # Errors
    /// In words.
    pub fn service_key(&self, org: &OrgId) -> Result<Option<String>, String> {
        let path = self.key_path(org);
        match fs::read_to_string(&path) {
            Ok(key) => Ok(Some(key.trim_end().to_owned())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    /// Keeps it.
    ///
    /// # Errors
    /// In words.
    pub fn keep_service_key(&self, org: &OrgId, key: &str) -> Result<(), String> {
        let path = self.key_path(org);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        }
        write_private(&path, key.as_bytes())
    }

    fn key_path(&self, org: &OrgId) -> PathBuf {
        self.path.join("service-keys").join(org.as_str())
    }
}

/// Removes all but the marker, which stays locked.
fn empty(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_name() == MARKER {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Writes a file that only its owner may read: whole or not at all.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), String> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let young = path.with_file_name(name);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&young)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&young, path)
    })();
    written.map_err(|error: std::io::Error| {
        let _ = fs::remove_file(&young);
        format!("{}: {error}", path.display())
    })
}

/// 256 random bits as 43 letters that need no escaping anywhere.
fn random() -> Result<String, String> {
    let mut bytes = [0; 32];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| "the system gives no randomness".to_owned())?;
    Ok(data_encoding::BASE64URL_NOPAD.encode(&bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_foreign_folder_is_neither_used_nor_wiped() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("thesis.tex"), "years of work").expect("written");
        for reset in [false, true] {
            assert!(Folder::open(folder.path(), reset).is_err());
        }
        assert!(folder.path().join("thesis.tex").exists());
    }

    #[test]
    fn secrets_are_made_once_and_are_the_owners_alone() {
        let parent = tempfile::tempdir().expect("a folder");
        let path = parent.path().join("dev");
        let first = Folder::open(&path, false).expect("made");
        let secrets = first.secrets().expect("made");
        assert!(Folder::open(&path, false).is_err_and(|error| error.contains("another")));
        drop(first);
        let again = Folder::open(&path, false).expect("used again");
        assert_eq!(again.secrets().expect("read").root_secret, secrets.root_secret);
        let mode = fs::metadata(path.join("secrets.json")).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(again);
        let reset = Folder::open(&path, true).expect("wiped");
        assert_ne!(reset.secrets().expect("made").root_secret, secrets.root_secret);
    }
}
