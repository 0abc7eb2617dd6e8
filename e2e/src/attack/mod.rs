//! `boxlite-e2e attack`: acts as a hostile guest kernel. It takes the share's device from the kernel, asks the file server for
//! files outside of the share, and gives file server and VMM invalid requests and queues. Prints a JSON line for each attempt; the
//! case `hostile_guest` judges them on the host. Runs inside a guest, in a privileged container; the VM is unusable afterwards.

mod device;
mod files;
mod fuse;
#[allow(unsafe_code)]
mod memory;
mod queues;
mod requests;

use crate::failure::Result;
use device::Device;
use fuse::{Answer, ROOT, Session};
use serde_json::json;
use std::io::Write;
use std::time::Duration;

/// Name of everything that is created, for a search on the host.
pub(crate) const MARK: &str = "boxlite-attack";

/// Time between a line and its attempt: the line reaches the host before the VM can end.
const PAUSE_BEFORE_ATTEMPT: Duration = Duration::from_millis(300);

/// Target of the attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Aim {
    /// Files outside of the share, by valid requests with names that lead there.
    Files,
    /// The file server, by random requests.
    Requests,
    /// The VMM, by queues and descriptors that the specification forbids.
    Queues,
}

/// Runs all attempts of an aim on each file system device. `arguments` are absolute paths of the host, or the number of the
/// first queue to try.
pub(crate) fn run(aim: Aim, arguments: &[String]) -> Result {
    // Pages of this program cannot be loaded any more once the device is taken.
    memory::lock()?;
    for device in Device::all()? {
        let mut session = Session::open(device)?;
        if session.create(ROOT, MARK).err() == Some(libc::ENOSYS) {
            // libkrun's other devices, which have no files.
            continue;
        }
        say(&json!({"stage": "taken"}));
        match aim {
            Aim::Files => files::run(&mut session, arguments),
            Aim::Requests => requests::run(&mut session)?,
            Aim::Queues => queues::run(
                &mut session,
                arguments.first().map_or(Ok(0), |n| n.parse())?,
            ),
        }
    }
    say(&json!({"stage": "done"}));
    Ok(())
}

fn say(line: &serde_json::Value) {
    println!("{line}");
    // A failed write has no reader who could be told.
    let _ = std::io::stdout().flush();
}

fn report(place: &str, action: &str, name: &str, result: Answer<Vec<u8>>) {
    say(&json!({"action": action, "at": place, "name": name, "errno": result.err().unwrap_or(0)}));
}
