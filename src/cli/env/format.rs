//! The forms in which the variables are printed.
//!
//! # Invariants
//!
//! - What is printed can be used as it is, whatever the values hold: it is
//!   evaluated by `sh`, or parsed as YAML and then expanded, to those very values.
//! - A comment is made of whole lines, so no value can end one.

use clap::ValueEnum;
use serde_json::Value;

use super::needs::{Group, Needs};

/// Whom the output is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum Format {
    /// Commands for `sh`: eval "$(token-sidecar env)".
    Shell,
    /// A fragment of a service in a compose file.
    Compose,
    /// A fragment of a container in a pod.
    K8s,
}

impl Format {
    /// The whole output; a `doubt` stands at the top.
    pub(super) fn render(self, needs: &Needs, doubt: Option<&str>) -> String {
        let doubt = doubt.map(|doubt| commented(&format!("NOTE: {doubt}")));
        let groups = needs.groups.iter().map(|group| self.group(group));
        let offers = needs.offers.iter().map(|group| self.offer(group));
        let parts = [doubt.unwrap_or_default(), commented(self.usage()), self.opening().to_owned()]
            .into_iter()
            .chain(groups)
            .chain(offers)
            .chain([self.mount(needs), self_test(needs)]);
        parts.collect()
    }

    fn usage(self) -> &'static str {
        match self {
            Self::Shell => {
                "What a parser needs to go through token-sidecar.\n\
                 Use: eval \"$(token-sidecar env)\", then start the parser from the same shell."
            }
            Self::Compose => {
                "What a parser needs to go through token-sidecar.\n\
                 Put it into the parser's service, which must share a network with the sidecar."
            }
            Self::K8s => {
                "What a parser needs to go through token-sidecar.\n\
                 Put it into the parser's container."
            }
        }
    }

    fn opening(self) -> &'static str {
        match self {
            Self::Shell => "",
            Self::Compose => "environment:\n",
            Self::K8s => "env:\n",
        }
    }

    fn group(self, group: &Group) -> String {
        commented(&group.comment.join("\n")) + &self.variables(group)
    }

    /// The group as comments. A variable without its mark `# ` is one of those
    /// above it.
    fn offer(self, group: &Group) -> String {
        let indent = match self {
            Self::Shell => 0,
            Self::Compose | Self::K8s => 2,
        };
        let variables = self.variables(group);
        let lines = variables.lines().map(|line| line.split_at(indent));
        let marked: String = lines.flat_map(|(indent, rest)| [indent, "# ", rest, "\n"]).collect();
        commented(&group.comment.join("\n")) + &marked
    }

    fn variables(self, group: &Group) -> String {
        group.variables.iter().map(|(name, value)| self.variable(name, value)).collect()
    }

    fn variable(self, name: &str, value: &str) -> String {
        match self {
            Self::Shell => format!("export {name}={}\n", shell_quoted(value)),
            Self::Compose => format!("  {name}: {}\n", yaml_expanded(value)),
            Self::K8s => format!("  - name: {name}\n    value: {}\n", yaml_expanded(value)),
        }
    }

    /// How the trust files get to where the variables say.
    fn mount(self, needs: &Needs) -> String {
        match self {
            Self::Shell => String::new(),
            Self::Compose => {
                let hint = format!(
                    "The trust files. Here the volume `certs` that the sidecar writes; where it runs on the host,\n\
                     instead: type: bind, source: {}",
                    yaml_expanded(&needs.own_trust_dir)
                );
                let target = yaml_expanded(&needs.trust_dir);
                commented(&hint)
                    + &format!(
                        "volumes:\n  - type: volume\n    source: certs\n    target: {target}\n    read_only: true\n"
                    )
            }
            Self::K8s => {
                let hint = "The trust files. Here from a ConfigMap that holds ca.pem and ca-bundle.pem of the sidecar's\n\
                     TRUST_DIR; the pod needs: volumes: [{name: token-sidecar-trust, configMap: {name: token-sidecar-trust}}]";
                let path = yaml_quoted(&needs.trust_dir);
                commented(hint)
                    + &format!(
                        "volumeMounts:\n  - name: token-sidecar-trust\n    mountPath: {path}\n    readOnly: true\n"
                    )
            }
        }
    }
}

fn self_test(needs: &Needs) -> String {
    let about = "Does it work? Inside the parser's container, with these variables set:";
    commented(&format!("{about}\n{}", needs.self_test))
}

fn commented(text: &str) -> String {
    text.lines().flat_map(|line| ["# ", line, "\n"]).collect()
}

/// A word of `sh` that stands for `text`.
pub(super) fn shell_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A YAML string that stands for `text`; every JSON string is one.
fn yaml_quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// The same where `$` begins an expansion and `$$` is a dollar: in compose
/// files and in the values of Kubernetes.
fn yaml_expanded(text: &str) -> String {
    yaml_quoted(&text.replace('$', "$$"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quote_does_not_end_a_word() {
        assert_eq!(shell_quoted("a'b $c"), r"'a'\''b $c'");
        assert_eq!(yaml_quoted("a\"b\\\n"), r#""a\"b\\\n""#);
        assert_eq!(yaml_expanded("$a${b}"), r#""$$a$${b}""#);
    }

    #[test]
    fn a_comment_has_no_line_without_its_mark() {
        assert_eq!(commented("a\nb\n"), "# a\n# b\n");
    }
}
