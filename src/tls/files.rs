//! Files that appear whole or not at all.
//!
//! # Invariants
//!
//! - A file is complete, on disk and has its final mode before it gets its name.
//! - On the way there it is never readable by more users than at the end.

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::NamedTempFile;

use super::TlsError;

/// Reads the file at `path`; `None` if there is none.
pub(super) fn read(path: &Path) -> Result<Option<String>, TlsError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(TlsError::Read { path: path.to_owned(), cause }),
    }
}

/// Writes a new file at `path`, or leaves the one that is there: of several writers the first wins.
pub(super) fn create(path: &Path, contents: &[u8], mode: u32) -> Result<(), TlsError> {
    let created = stage(path, contents, mode).and_then(|staged| {
        match fs::hard_link(staged.path(), path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            // A file system without hard links: rename, if it can do that without replacing.
            Err(_) => match staged.persist_noclobber(path) {
                Err(refused) if refused.error.kind() != ErrorKind::AlreadyExists => {
                    Err(refused.error)
                }
                _ => Ok(()),
            },
        }
    });
    finish(path, created)
}

/// Writes the file at `path`, in place of the one that may be there.
pub(super) fn replace(path: &Path, contents: &[u8], mode: u32) -> Result<(), TlsError> {
    let replaced = stage(path, contents, mode)
        .and_then(|staged| staged.persist(path).map_err(|refused| refused.error));
    finish(path, replaced.map(drop))
}

/// Removes the file at `path` if there is one.
pub(super) fn remove(path: &Path) -> Result<(), TlsError> {
    let removed = match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    };
    finish(path, removed)
}

/// Makes the folder `dir` with its parents.
pub(super) fn create_dir(dir: &Path) -> Result<(), TlsError> {
    fs::create_dir_all(dir).map_err(|cause| TlsError::Write { path: dir.to_owned(), cause })
}

/// A finished file under a passing name in the folder of `path`. It is born with mode 0600.
fn stage(path: &Path, contents: &[u8], mode: u32) -> io::Result<NamedTempFile> {
    let mut staged = tempfile::Builder::new().prefix(".new-").tempfile_in(folder(path))?;
    staged.write_all(contents)?;
    staged.as_file().set_permissions(Permissions::from_mode(mode))?;
    staged.as_file().sync_all()?;
    Ok(staged)
}

/// Names the file in an error; after a success, makes its name last through a loss of power.
fn finish(path: &Path, result: io::Result<()>) -> Result<(), TlsError> {
    result.map_err(|cause| TlsError::Write { path: path.to_owned(), cause })?;
    // Some file systems cannot sync a folder; there is nothing better to do on those.
    let _ = File::open(folder(path)).and_then(|folder| folder.sync_all());
    Ok(())
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
