//! Draining: one signal that everybody hears, one count of the tasks still running, one deadline.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;

#[derive(Debug, Default)]
struct Inner {
    draining: AtomicBool,
    started: Notify,
    live: AtomicU32,
    idle: Notify,
}

/// A handle on one drain. Cheap to clone; all clones are the same drain.
#[derive(Clone, Debug, Default)]
pub struct Drain(Arc<Inner>);

impl Drain {
    /// A drain that has not started.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts draining. Starting twice is starting once.
    pub fn start(&self) {
        self.0.draining.store(true, Ordering::Release);
        self.0.started.notify_waiters();
    }

    /// Whether [`Self::start`] was called. One load: cheap enough to ask at every admission.
    pub fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::Acquire)
    }

    /// Waits until [`Self::start`] was called; returns at once if it was.
    ///
    /// # Cancel safety
    /// May be dropped at any point.
    pub async fn started(&self) {
        let mut told = std::pin::pin!(self.0.started.notified());
        // Registered before looking, so that a start in between is not missed.
        told.as_mut().enable();
        if !self.is_draining() {
            told.await;
        }
    }

    /// Counts a task as live until the guard is dropped, also by a panic.
    pub fn enter(&self) -> Live {
        self.0.live.fetch_add(1, Ordering::Relaxed);
        Live(Arc::clone(&self.0))
    }

    /// Tasks live now.
    pub fn live(&self) -> u32 {
        self.0.live.load(Ordering::Acquire)
    }

    /// Waits until no task is live. Says nothing about tasks that enter later, so call it after [`Self::start`].
    ///
    /// # Errors
    /// How many were left when `deadline` had passed; the caller ends them.
    ///
    /// # Cancel safety
    /// May be dropped at any point.
    pub async fn drained(&self, deadline: Duration) -> Result<(), u32> {
        let empty = async {
            loop {
                let mut told = std::pin::pin!(self.0.idle.notified());
                told.as_mut().enable();
                if self.live() == 0 {
                    return;
                }
                told.await;
            }
        };
        tokio::time::timeout(deadline, empty).await.map_err(|_| self.live())
    }
}

/// One live task. Dropping it says that the task has ended.
#[derive(Debug)]
pub struct Live(Arc<Inner>);

impl Drop for Live {
    fn drop(&mut self) {
        // Release, so that whoever sees zero also sees everything that the tasks did.
        if self.0.live.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn everybody_hears_the_start_whether_before_or_after() {
        let drain = Drain::new();
        let early = tokio::spawn({
            let drain = drain.clone();
            async move { drain.started().await }
        });
        tokio::task::yield_now().await;
        assert!(!early.is_finished() && !drain.is_draining());
        drain.start();
        early.await.unwrap();
        drain.started().await;
    }

    #[tokio::test]
    async fn drained_waits_for_the_last_task_or_says_how_many_are_left() {
        let drain = Drain::new();
        let (a, b) = (drain.enter(), drain.enter());
        assert_eq!(drain.drained(Duration::from_millis(1)).await, Err(2));
        drop(a);
        let panicked = tokio::spawn(async move {
            let _b = b;
            panic!("a task may panic");
        });
        assert_eq!(drain.drained(Duration::from_secs(60)).await, Ok(()));
        assert!(panicked.await.is_err());
    }
}
