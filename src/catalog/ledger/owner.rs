//! Who works on a transition: a process, named so that another one on the same machine can see that it has ended and
//! need not wait for its lease.

use std::fs;

/// This process: the machine's boot, the process namespace, the process and when it began.
pub fn this_process() -> String {
    let pid = std::process::id();
    let began = began(pid).unwrap_or_default();
    format!("{}-{pid}-{began}", here())
}

/// Whether `owner` was a process of this machine that has ended. `false` when nobody can say.
pub fn is_dead(owner: &str) -> bool {
    let Some((place, began_then)) = owner.rsplit_once('-') else { return false };
    let Some((place, pid)) = place.rsplit_once('-') else { return false };
    let (Ok(pid), Ok(began_then)) = (pid.parse::<u32>(), began_then.parse::<u64>()) else { return false };
    // Without /proc nothing is known about anybody.
    place == here() && began(std::process::id()).is_some() && began(pid) != Some(began_then)
}

/// Boot and process namespace: process numbers mean the same to all who share both.
fn here() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let digits: String = namespace.to_string_lossy().chars().filter(char::is_ascii_digit).collect();
    format!("{}.{digits}", boot.trim().split('-').next().unwrap_or_default())
}

/// When a process began, in ticks since boot; `None` when there is no such process (a zombie is none).
fn began(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the program's name, which may hold anything: the state is field 3, the start field 22.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_lives_is_not_dead_and_one_that_ended_is() {
        let own = this_process();
        assert!(!is_dead(&own), "{own}");
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("a child");
        let owner = format!("{}-{}-{}", here(), child.id(), began(child.id()).expect("it runs"));
        assert!(!is_dead(&owner));
        child.kill().expect("killed");
        child.wait().expect("ended");
        assert!(is_dead(&owner));
        // The same number, another process.
        assert!(is_dead(&format!("{}-{}-1", here(), std::process::id())));
        // Another machine, or nobody's name.
        assert!(!is_dead("0badc0de.1-1-1") && !is_dead("") && !is_dead("me"));
    }
}
