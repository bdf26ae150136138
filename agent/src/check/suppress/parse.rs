//! The format of suppression files.

use std::sync::Arc;

use super::{
    Field, Kind, MAX_FILE, ParseError, Rule, RuleId,
    frames::FrameLine,
    pattern::{MAX_GLOB, Pattern},
};
use crate::text::printable;

/// The reason that a generated block has: to be replaced.
pub(super) const NO_REASON: &str = "TODO say why";

/// Most functions that a stack has, so most lines that can be of use.
const MAX_FRAME_LINES: usize = 256;
const BLANKS: [char; 3] = [' ', '\t', '\r'];

/// All rules of a file, or what is wrong with it.
pub(super) fn parse(text: &str, file: &str) -> Result<Vec<Rule>, ParseError> {
    let mut parser = Parser { file, name: Arc::from(file), lines: text.lines().zip(1..), line: 1 };
    if text.len() > MAX_FILE {
        return Err(
            parser.error("the file is larger than 1 MiB", "put similar rules together with * in their globs")
        );
    }
    let mut rules = Vec::new();
    while let Some(line) = parser.next() {
        if line != "{" {
            return Err(parser.error(
                format!("{} is outside of a block", quoted(line)),
                "a block begins with { and ends with }, each on a line of its own",
            ));
        }
        rules.push(parser.block()?);
    }
    Ok(rules)
}

fn quoted(text: &str) -> String {
    format!("`{}`", printable(text.as_bytes()))
}

struct Parser<'a> {
    file: &'a str,
    name: Arc<str>,
    lines: std::iter::Zip<std::str::Lines<'a>, std::ops::RangeFrom<usize>>,
    /// The last that was read.
    line: usize,
}

impl<'a> Parser<'a> {
    fn error(&self, cause: impl Into<String>, remedy: impl Into<String>) -> ParseError {
        let (file, line) = (self.file.to_owned(), self.line);
        ParseError { file, line, cause: cause.into(), remedy: remedy.into() }
    }

    /// The next line that says something.
    fn next(&mut self) -> Option<&'a str> {
        for (text, line) in self.lines.by_ref() {
            self.line = line;
            let text = text.trim_matches(BLANKS);
            if !text.is_empty() && !text.starts_with('#') {
                return Some(text);
            }
        }
        None
    }

    /// The next line of a block that begins at `start`.
    fn within(&mut self, start: usize) -> Result<&'a str, ParseError> {
        match self.next() {
            Some("{") => Err(self.error(
                format!("a block begins inside the one of line {start}"),
                "end that one with } on a line of its own",
            )),
            Some(line) => Ok(line),
            None => {
                self.line = start;
                Err(self.error("the block has no end", "end it with } on a line of its own"))
            }
        }
    }

    fn block(&mut self) -> Result<Rule, ParseError> {
        let start = self.line;
        let name = self.name_of(start)?;
        let reason = self.reason(start)?;
        let kinds = self.kinds(start)?;
        let mut fields: Vec<(Field, Pattern)> = Vec::new();
        let mut stack = Vec::new();
        loop {
            let line = self.within(start)?;
            if line == "}" {
                break;
            }
            if let Some(frame) = self.frame(line)? {
                self.push_frame(&mut stack, frame)?;
                continue;
            }
            let (field, pattern) = self.field(line)?;
            if !stack.is_empty() {
                return Err(self.error(
                    format!("`{}:` comes after the stack", field.word()),
                    "write it above the first line of the stack",
                ));
            }
            if fields.iter().any(|(given, _)| *given == field) {
                let remedy = "keep one of them: {one,two} in a glob is a choice";
                return Err(self.error(format!("`{}:` is given twice", field.word()), remedy));
            }
            fields.push((field, pattern));
        }
        if fields.is_empty() && stack.iter().all(|line| matches!(line, FrameLine::Any)) {
            let remedy = "give a field (comm, syscall, resource, target, thread) or lines of a stack";
            return Err(self.error("the rule would suppress every finding of its kind", remedy));
        }
        let file = Arc::clone(&self.name);
        Ok(Rule { id: RuleId(0), name, reason, file, line: start, kinds, fields, stack })
    }

    fn name_of(&mut self, start: usize) -> Result<String, ParseError> {
        let line = self.within(start)?;
        if line == "}" || line.starts_with("reason:") {
            return Err(
                self.error("the rule has no name", "the first line in a block is the name of its rule")
            );
        }
        self.plain(line, "name")
    }

    fn reason(&mut self, start: usize) -> Result<String, ParseError> {
        let line = self.within(start)?;
        let Some(reason) = line.strip_prefix("reason:") else {
            return Err(self.error(
                "the rule does not say why it is there",
                "write `reason: ...` on the line below its name: why this is no leak",
            ));
        };
        let reason = reason.trim_matches(BLANKS);
        if reason.is_empty() {
            return Err(self.error("the reason is empty", "say why this is no leak"));
        }
        let begin = reason.get(..4).unwrap_or_default();
        if begin.eq_ignore_ascii_case("todo") && !reason[4..].starts_with(char::is_alphanumeric) {
            return Err(self.error(
                "the reason is still the placeholder",
                format!("replace {} by why this is no leak", quoted(reason)),
            ));
        }
        self.plain(reason, "reason")
    }

    fn plain(&self, text: &str, what: &str) -> Result<String, ParseError> {
        if text.chars().any(crate::text::is_harmful) {
            let cause = format!("the {what} holds characters that control a terminal");
            return Err(self.error(cause, "write plain text"));
        }
        Ok(text.to_owned())
    }

    fn kinds(&mut self, start: usize) -> Result<Vec<Kind>, ParseError> {
        let line = self.within(start)?;
        let known = Kind::ALL.map(Kind::word).join(", ");
        let remedy = format!("write the kinds of findings below the reason: any, or some of {known}");
        if line == "any" {
            return Ok(Kind::ALL.to_vec());
        }
        line.split(',')
            .map(|word| word.trim_matches(BLANKS))
            .map(|word| {
                let cause = || format!("{} is no kind of finding", quoted(word));
                Kind::from_word(word).ok_or_else(|| self.error(cause(), remedy.clone()))
            })
            .collect()
    }

    fn frame(&self, line: &str) -> Result<Option<FrameLine>, ParseError> {
        if line == "..." {
            return Ok(Some(FrameLine::Any));
        }
        let Some((word, value)) = line.split_once(':') else { return Ok(None) };
        let value = value.trim_matches(BLANKS);
        Ok(Some(match word {
            "fun" => FrameLine::Fun(self.glob(value)?),
            "obj" => FrameLine::Obj(self.glob(value)?),
            "src" => {
                let split = value.rsplit_once(':').and_then(|(path, line)| Some((path, line.parse().ok()?)));
                let (path, line) = split.map_or((value, None), |(path, line)| (path, Some(line)));
                FrameLine::Src(self.glob(path)?, line)
            }
            _ => return Ok(None),
        }))
    }

    fn push_frame(&self, stack: &mut Vec<FrameLine>, frame: FrameLine) -> Result<(), ParseError> {
        // Two in a row say no more than one.
        if matches!((stack.last(), &frame), (Some(FrameLine::Any), FrameLine::Any)) {
            return Ok(());
        }
        if stack.len() >= 2 * MAX_FRAME_LINES {
            let remedy = format!("a stack has at most {MAX_FRAME_LINES} functions; end the block with }}");
            return Err(self.error("the rule has too many lines of a stack", remedy));
        }
        stack.push(frame);
        Ok(())
    }

    fn field(&self, line: &str) -> Result<(Field, Pattern), ParseError> {
        let known = line.split_once(':').and_then(|(word, value)| {
            Some((Field::ALL.into_iter().find(|field| field.word() == word)?, value))
        });
        let Some((field, value)) = known else {
            let fields = Field::ALL.map(Field::word).join(", ");
            return Err(self.error(
                format!("{} is no line of a rule", quoted(line)),
                format!("write `FIELD: GLOB` with one of {fields}, fun, obj, src, or ... for any functions"),
            ));
        };
        Ok((field, self.glob(value.trim_matches(BLANKS))?))
    }

    fn glob(&self, written: &str) -> Result<Pattern, ParseError> {
        if written.is_empty() {
            return Err(self.error("the glob is empty", "write one, or leave the line out"));
        }
        if written.len() > MAX_GLOB {
            return Err(
                self.error(format!("the glob is longer than {MAX_GLOB} bytes"), "end it early with *")
            );
        }
        Pattern::new(written).map_err(|error| {
            let cause = format!("{} is no glob: {error}", quoted(written));
            self.error(cause, "put \\ before each of * ? [ ] { } \\ that stands for itself")
        })
    }
}
