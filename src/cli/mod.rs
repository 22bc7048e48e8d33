//! The commands.

mod ca;
mod client;
mod demo;
mod doctor;
mod env;
mod refresh;
mod run;
mod token;

use std::fmt::Write;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::app::AppError;
use crate::config::{Config, ConfigError, Env, VARIABLES};
use crate::telemetry;

/// A setting is wrong, or the command line is: what clap ends with, too.
const EXIT_USAGE: u8 = 2;

/// The sidecar refused to act, or the API refuses every new token.
const EXIT_REFUSED: u8 = 1;

/// A source or a store failed.
const EXIT_FAILED: u8 = 3;

/// What to do where no store keeps the token.
const NO_STORE: &str =
    "there is no store; set ENV_FILE, or make a .env (`cp .env.example .env`), or set REDIS_URL";

#[derive(Parser)]
#[command(name = "token-sidecar", version, about, after_help = "")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the sidecar (the default).
    Run,
    /// Show the whole story on loopback, with stand-ins; needs nothing else.
    Demo,
    /// Renew the token now: in the running sidecar, or without one by itself.
    Refresh,
    /// Show the token's state as the stores have it.
    Token {
        /// Print the bare token of the newest store and nothing else.
        #[arg(long)]
        reveal: bool,
    },
    /// Show the CA that clients must trust.
    Ca {
        /// Make a new key and certificate; the old ones are kept as *.old.
        #[arg(long)]
        renew: bool,
    },
    /// Print the variables that a parser needs to go through the sidecar.
    Env {
        /// Whom they are for.
        #[arg(long, value_enum, default_value = "shell")]
        format: env::Format,
    },
    /// Check each dependency and the whole path, and say what to do; changes nothing.
    Doctor {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
        /// Ask the sources for a token, too; it is verified and thrown away.
        #[arg(long)]
        solve: bool,
    },
    /// Show what the running sidecar says of itself, as JSON.
    Status {
        /// Show its metrics, as Prometheus reads them.
        #[arg(long)]
        metrics: bool,
    },
    /// Ask the running sidecar whether it lives; exit code 0 if so.
    Healthcheck {
        /// Ask whether it has a usable token, too.
        #[arg(long)]
        ready: bool,
    },
}

/// Parses the command line, runs the command, and maps errors to exit codes:
/// 0 done, 1 failed or refused, 2 wrong settings or usage, 3 a source or store
/// failed.
#[must_use]
pub fn main() -> ExitCode {
    let matches = Cli::command().after_help(variables_help()).get_matches();
    let command = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli.command.unwrap_or(Command::Run),
        Err(error) => error.exit(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("no runtime: {error}"), 1),
    };
    let ended = runtime.block_on(command.execute());
    // What still blocks (a name being resolved) must not keep the process.
    runtime.shutdown_background();
    ended.unwrap_or_else(|error| match error {
        AppError::Config(error) => fail(&error.to_string(), EXIT_USAGE),
        error => fail(&error.to_string(), 1),
    })
}

impl Command {
    async fn execute(self) -> Result<ExitCode, AppError> {
        if let Self::Demo = self {
            return Ok(demo::execute().await);
        }
        let (env, config) = settings().inspect_err(|error| {
            if let Self::Doctor { json: true, .. } = self {
                doctor::refuse(error);
            }
        })?;
        match self {
            Self::Demo => Ok(ExitCode::SUCCESS),
            Self::Run => run::execute(config, &env).await,
            Self::Refresh => refresh::execute(&config).await,
            Self::Token { reveal } => token::execute(&config, reveal).await,
            Self::Ca { renew } => ca::execute(&config, renew),
            Self::Doctor { json, solve } => {
                doctor::execute(config, &env, doctor::Options { json, solve }).await
            }
            Self::Env { format } => Ok(env::execute(&config, format)),
            Self::Status { metrics } => Ok(client::status(&config, metrics).await),
            Self::Healthcheck { ready } => Ok(client::healthcheck(&config, ready).await),
        }
    }
}

fn settings() -> Result<(Env, Config), ConfigError> {
    let env = Env::from_process()?;
    let config = Config::from_env(&env)?;
    Ok((env, config))
}

/// Sets up logging as `RUST_LOG` and `LOG_FORMAT` say.
fn init_log(log: &crate::config::Log) -> Result<(), ConfigError> {
    let format = if log.json { telemetry::Format::Json } else { telemetry::Format::Text };
    telemetry::init(&log.filter, format)
        .map_err(|error| ConfigError::new("RUST_LOG", error.to_string()))
}

fn fail(message: &str, code: u8) -> ExitCode {
    eprintln!("token-sidecar: {message}");
    ExitCode::from(code)
}

fn variables_help() -> String {
    let mut help = String::from(
        "Environment variables (empty counts as unset; also read from ENV_FILE).\n\
         Times: 500ms 10s 5m 3h. Sizes: 64KiB 8MiB.\n",
    );
    for variable in VARIABLES {
        let default = match variable.default {
            "" => String::new(),
            default => format!(" [default: {default}]"),
        };
        // Writing to a String cannot fail.
        let _ = write!(help, "\n  {}\n          {}{default}", variable.name, variable.meaning);
    }
    help
}
