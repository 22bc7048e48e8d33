//! The documents say what the registry of variables says.

use std::fs;

use token_sidecar::config::{VARIABLES, Variable};

fn read(name: &str) -> String {
    fs::read_to_string(format!("{}/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// Every variable is in `document` once, as `line` writes it, and no other is.
fn check(document: &str, line: impl Fn(&Variable) -> String, is_line: impl Fn(&str) -> bool) {
    let text = read(document);
    let mut found: Vec<&str> = text.lines().filter(|line| is_line(line)).collect();
    let mut expected: Vec<String> = VARIABLES.iter().map(line).collect();
    found.sort_unstable();
    expected.sort_unstable();
    assert_eq!(found, expected, "{document}");
}

#[test]
fn readme_lists_every_variable_with_default_and_meaning() {
    let line = |variable: &Variable| {
        let default = match variable.default {
            "" => "none".to_owned(),
            default => format!("`{default}`"),
        };
        format!("| `{}` | {default} | {} |", variable.name, variable.meaning)
    };
    check("README.md", line, |line| {
        let name = line.strip_prefix("| `").and_then(|rest| rest.split_once("` | "));
        name.is_some_and(|(name, _)| name.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
    });
}

#[test]
fn env_example_has_every_variable_with_its_default() {
    let line = |variable: &Variable| match variable.name {
        // Examples, since there is no default; the comment says so.
        "FLARESOLVERR_URL" => "# FLARESOLVERR_URL=http://127.0.0.1:8191/v1".to_owned(),
        "REDIS_URL" => "# REDIS_URL=redis://127.0.0.1:6379/0".to_owned(),
        // Kept up to date by the sidecar.
        "CHITAI_GOROD_BEARER_TOKEN" => "CHITAI_GOROD_BEARER_TOKEN=\"\"".to_owned(),
        name if variable.default.contains(['&', '[']) => format!("# {name}='{}'", variable.default),
        name => format!("# {name}={}", variable.default),
    };
    check(".env.example", line, is_assignment);
}

/// Commented out or not.
fn is_assignment(line: &str) -> bool {
    let line = line.strip_prefix("# ").unwrap_or(line);
    let name = line.split_once('=').map(|(name, _)| name);
    name.is_some_and(|name| VARIABLES.iter().any(|variable| variable.name == name))
}

#[test]
fn env_prod_example_has_every_variable_with_its_value_in_the_compose_project() {
    let project = [
        ("PROXY_LISTEN", "0.0.0.0:8080"),
        ("ADVERTISE_URL", "http://token-sidecar:8080"),
        ("FLARESOLVERR_URL", "http://flaresolverr:8191/v1"),
        ("REDIS_URL", "redis://redis:6379/0"),
        ("REDIS_PASSWORD_FILE", "/redis/password"),
        ("MAX_CONNECTIONS", "4000"),
        ("MAX_CLIENT_CONNECTIONS", "2000"),
        ("CA_DIR", "/ca"),
        ("TRUST_DIR", "/certs"),
        ("ENV_FILE", "/state/token.env"),
    ];
    let compose = read("docker-compose.prod.yml");
    for (name, value) in project {
        let set = [
            format!("      {name}: {value}"),
            format!("      {name}: ${{{name}:-{value}}}"),
            format!("      {name}: ${{{name}-{value}}}"),
        ];
        assert!(compose.lines().any(|line| set.iter().any(|set| set == line)), "{name}");
    }
    let line = |variable: &Variable| {
        let name = variable.name;
        let own = project.iter().find(|(own, _)| *own == name).map(|(_, value)| *value);
        match (name, own.unwrap_or(variable.default)) {
            // Left to be filled in.
            ("REDIS_PASSWORD", _) => "REDIS_PASSWORD=".to_owned(),
            (_, value) if value.contains(['&', '[']) => format!("# {name}='{value}'"),
            (_, value) => format!("# {name}={value}"),
        }
    };
    check(".env.prod.example", line, is_assignment);
}

#[test]
fn env_prod_example_has_every_variable_of_the_compose_file_with_its_default() {
    let example = read(".env.prod.example");
    // `$${` is the shell's, inside the container.
    let compose = read("docker-compose.prod.yml").replace("$${", "");
    for used in compose.split("${").skip(1) {
        let (used, _) = used.split_once('}').unwrap();
        let (name, default) = used.split_once('-').unwrap();
        let name = name.trim_end_matches(':');
        let line = format!("{name}={default}");
        assert!(
            example.lines().any(|shown| shown.strip_prefix("# ").unwrap_or(shown) == line),
            "{line}"
        );
    }
}

#[test]
fn the_image_is_labelled_and_built_with_the_versions_of_the_manifest() {
    let dockerfile = read("Dockerfile");
    for line in [
        concat!("ARG VERSION=", env!("CARGO_PKG_VERSION")),
        concat!("ARG RUST=rust:", env!("CARGO_PKG_RUST_VERSION"), ".0-slim-bookworm"),
    ] {
        assert!(dockerfile.lines().any(|found| found == line), "{line}");
    }
}

/// The fenced blocks of a document, each with its opening line.
fn blocks(document: &str) -> Vec<Vec<String>> {
    let mut blocks: Vec<Vec<String>> = Vec::new();
    let mut is_inside = false;
    for line in read(document).lines() {
        if is_inside && line == "```" {
            is_inside = false;
        } else if is_inside {
            blocks.last_mut().unwrap().push(line.to_owned());
        } else if line.starts_with("```") {
            is_inside = true;
            blocks.push(vec![line.to_owned()]);
        }
    }
    assert!(!is_inside, "{document}: a block without an end");
    blocks
}

#[test]
fn both_deployment_guides_have_the_same_commands_in_the_same_order() {
    let [english, russian] = ["DEPLOY_TOKEN_UPDATE.md", "DEPLOY_TOKEN_UPDATE.ru.md"].map(blocks);
    // What tests/compose/guide.sh knows what to do with.
    for block in &english {
        let opening = block[0].as_str();
        let known = ["```sh", "```sh norun", "```text", "```ini", "```yaml"];
        assert!(known.contains(&opening), "{block:?}");
    }
    assert!(english.iter().filter(|block| block[0] == "```sh").count() > 20);
    for (english, russian) in english.iter().zip(&russian) {
        assert_eq!(english, russian);
    }
    assert_eq!(english.len(), russian.len());
}

#[test]
fn env_example_says_which_values_are_no_defaults() {
    let text = read(".env.example");
    for name in ["FLARESOLVERR_URL", "REDIS_URL"] {
        let mut lines = text.lines().zip(text.lines().skip(1));
        let (comment, _) = lines.find(|(_, line)| line.starts_with(&format!("# {name}="))).unwrap();
        assert!(comment.ends_with("no default, an example."), "{comment}");
    }
}

#[test]
fn env_example_writes_no_literal_with_a_capital() {
    let text = read(".env.example");
    for comment in text.lines().filter_map(|line| line.strip_prefix("# ")) {
        let word = comment.split(' ').next().unwrap_or_default().trim_end_matches([':', ',', '.']);
        let is_literal = word.contains(['/', ':', '=']);
        assert!(!is_literal || VARIABLES.iter().any(|v| word.starts_with(v.name)), "{comment}");
    }
}
