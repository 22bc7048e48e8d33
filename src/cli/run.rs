//! `run`: the sidecar, until a signal ends it.

use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{info, warn};

use super::init_log;
use crate::app::{App, AppError};
use crate::config::{Config, Env};

/// Runs until SIGTERM or SIGINT, then drains; a second signal ends at once.
pub(super) async fn execute(config: Config, env: &Env) -> Result<ExitCode, AppError> {
    init_log(&config.log)?;
    for (given, known) in env.near_misses() {
        warn!(given, known, "unknown variable looks like one of ours");
    }
    let mut stop = StopSignals::new().map_err(AppError::Workers)?;
    let mut reload = signal(SignalKind::hangup()).map_err(AppError::Workers)?;
    let app = App::start(&config)?;
    loop {
        tokio::select! {
            () = stop.recv() => break,
            _ = reload.recv() => {
                info!("reading the stores again");
                app.reload_stores();
            }
        }
    }
    tokio::select! {
        () = app.drain() => Ok(ExitCode::SUCCESS),
        () = stop.recv() => {
            warn!("second signal, ending at once");
            Ok(ExitCode::FAILURE)
        }
    }
}

/// SIGTERM and SIGINT.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn recv(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
