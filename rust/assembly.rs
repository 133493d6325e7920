//! From the tables of checkpoints to the rows of a plan.
//!
//! Python says which layers of which models an output layer is made of, and what the parameters are;
//! both are questions of a run of tensors, not of one. What goes through all of its tensors is here:
//! finding them by name in every model, comparing shapes and types, filling the plan's table, and
//! taking down what becomes of each tensor. A tensor that does not agree is handed back, for Python to
//! say what is wrong with it.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use crate::checkpoint::token_rows::TokenRows;
use crate::checkpoint::{Checkpoint, Tensor, lay_out, lead};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::plan::{Adapted, Builder, ByToken, Input, InputFile, Part, Plan, Settings};

/// What becomes of a tensor of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fate {
    /// It does not get into the output.
    #[default]
    Dropped,
    /// Its bytes are in the output as they are.
    Copied,
    /// It takes part in arithmetic.
    Merged,
}

/// A plan that is put together from models.
#[derive(Debug)]
pub struct Assembly {
    models: Vec<Arc<Checkpoint>>,
    /// What each model's files are among those of all.
    files: Vec<Vec<usize>>,
    /// The type of the output's floats, if the recipe says.
    dtype: Option<DType>,
    builder: Builder,
    fates: Vec<Vec<Fate>>,
    /// The shapes that tensors have in any layer of the model that gives the config.
    layer_shapes: HashMap<String, HashSet<Vec<u64>>>,
    /// The rows of tokens, and the tensors that have a row for each.
    tokens: Option<(TokenRows, HashSet<String>)>,
    /// The numbers of what adapters make of tensors, by model and tensor.
    adapted: HashMap<(usize, usize), u32>,
    /// The maps of rows that inputs of these models have.
    maps: HashMap<Vec<usize>, Vec<u32>>,
}

/// Where the tensors of a run are in one model: names there begin with `lead`.
#[derive(Clone, Debug)]
pub struct Column {
    /// The model.
    pub model: usize,
    /// What names begin with there, up to the layer's number; nothing where names are the same.
    pub lead: String,
}

/// Tensors that are treated alike but for filters: a layer, or a few loose ones.
#[derive(Debug)]
pub struct Run {
    donor: usize,
    /// Indices in the donor.
    tensors: Vec<usize>,
    names: Vec<String>,
    columns: Vec<Column>,
    /// For each tensor, its index in each column's model.
    found: Vec<Vec<Option<usize>>>,
    /// The group of each tensor.
    groups: Vec<usize>,
    /// Whether its rows are taken by token.
    by_token: Vec<bool>,
    keeping: Keeping,
}

/// Which tensors of a run are made of one column alone.
#[derive(Clone, Debug)]
pub struct Keeping {
    /// How many columns are inputs of the method; those behind them are only kept from.
    pub inputs: usize,
    /// The column that a tensor is kept from, by its position in the run.
    pub kept: HashMap<usize, usize>,
    /// The column for tensors that an input lacks or has in another shape; without it they are odd.
    pub otherwise: Option<usize>,
}

/// A tensor of a run that needs a look.
#[derive(Clone, Copy, Debug)]
pub struct Odd {
    /// Its position in the run.
    pub at: usize,
    /// Whether the output has a tensor of that name already.
    pub is_twice: bool,
}

impl Assembly {
    /// Begins a plan of `models`, whose own files come first in it.
    pub fn new(
        method: String,
        seed: u64,
        models: Vec<(String, Arc<Checkpoint>)>,
        other_files: Vec<InputFile>,
        dtype: Option<DType>,
        in_f64: bool,
    ) -> Self {
        let (labels, models): (Vec<_>, Vec<_>) = models.into_iter().unzip();
        // Models with adapters on one base share its files.
        let mut all: Vec<InputFile> = Vec::new();
        let mut number = |file: &InputFile| {
            all.iter().position(|known| known == file).unwrap_or_else(|| {
                all.push(file.clone());
                all.len() - 1
            })
        };
        let of_model = |model: &Arc<Checkpoint>| model.files.iter().map(&mut number).collect();
        let files = models.iter().map(of_model).collect();
        all.extend(other_files);
        let mut plan = Plan::new(method, seed, all, labels);
        plan.in_f64 = in_f64;
        let fates = models.iter().map(|model| vec![Fate::Dropped; model.len()]).collect();
        let builder = Builder::new(plan);
        Self {
            models,
            files,
            dtype,
            builder,
            fates,
            layer_shapes: HashMap::new(),
            tokens: None,
            adapted: HashMap::new(),
            maps: HashMap::new(),
        }
    }

    /// Takes the rows of the tensors of these names by token, from then on.
    pub fn align(&mut self, tokens: TokenRows, names: HashSet<String>) {
        self.tokens = Some((tokens, names));
    }

    /// The rows of tokens, if a tensor of that name has a row for each.
    fn tokens_of(&self, name: &str) -> Option<&TokenRows> {
        self.tokens.as_ref().filter(|(_, names)| names.contains(name)).map(|(tokens, _)| tokens)
    }

    /// Takes down the shapes in layers of `donor`, whose stacks have these prefixes. From then on, what
    /// other models give a layer is compared with them.
    pub fn like_layers_of(&mut self, donor: usize, prefixes: &HashSet<String>) {
        for tensor in self.models[donor].tensors() {
            let lead = lead(tensor.name);
            let prefix = lead.rsplit_once('.').map_or("", |(prefix, _)| prefix);
            let is_placed = !lead.is_empty() && prefixes.contains(prefix);
            let key = shape_key(tensor.name, if is_placed { lead } else { "" });
            self.layer_shapes.entry(key).or_default().insert(tensor.shape.to_vec());
        }
    }

    /// Finds the tensors of a run: those of `donor` at `tensors`, whose names begin with `donor_lead`,
    /// with `lead` in the output.
    ///
    /// `is_like` says whether they have to fit the layers of the model that gives the config.
    #[expect(clippy::too_many_arguments, reason = "what a run is")]
    pub fn find(
        &mut self,
        donor: usize,
        tensors: Vec<usize>,
        donor_lead: &str,
        lead: &str,
        columns: Vec<Column>,
        is_like: bool,
        quantised: &[bool],
        mut keeping: Keeping,
    ) -> (Run, Vec<Odd>) {
        let (mut names, mut found, mut odd) = (Vec::new(), Vec::new(), Vec::new());
        let mut by_token = Vec::new();
        let mut buffer = String::new();
        let source = Arc::clone(&self.models[donor]);
        for (at, &tensor) in tensors.iter().enumerate() {
            let like = source.tensor(tensor);
            let rest = &like.name[donor_lead.len()..];
            let each: Vec<Option<usize>> = columns
                .iter()
                .map(|column| {
                    if column.model == donor && column.lead == donor_lead {
                        return Some(tensor);
                    }
                    buffer.clear();
                    buffer.push_str(&column.lead);
                    buffer.push_str(rest);
                    self.models[column.model].find(&buffer)
                })
                .collect();
            let name = format!("{lead}{rest}");
            let is_twice = !self.builder.take_name(&name);
            let tokens = self.tokens_of(like.name);
            by_token.push(tokens.is_some());
            let is_shaped = |column: usize| {
                let model = columns[column].model;
                each[column].is_some_and(|found| {
                    let tensor = self.models[model].tensor(found);
                    match (tokens, tensor.shape) {
                        (Some(tokens), [rows, rest @ ..]) => {
                            *rows == tokens.limit_of(model)
                                && like.shape.get(1..) == Some(rest)
                                && tensor.dtype.is_float()
                                && !rest.contains(&0)
                        }
                        (Some(_), []) => false,
                        (None, _) => tensor.shape == like.shape,
                    }
                })
            };
            if !keeping.kept.contains_key(&at)
                && let Some(otherwise) = keeping.otherwise
                && !keeping.used(at).all(is_shaped)
            {
                keeping.kept.insert(at, otherwise);
            }
            let used = keeping.used(at);
            let is_alone = used.len() == 1;
            let agrees = used.clone().zip(&each[used]).all(|(column, found)| {
                let model = columns[column].model;
                is_shaped(column)
                    && found.is_some_and(|found| {
                        let dtype = self.models[model].tensor(found).dtype;
                        (dtype == like.dtype || dtype.is_float() && like.dtype.is_float())
                            && (dtype.is_float() || is_alone || !quantised[model])
                    })
            });
            let fits = !is_like || self.fits(&like, donor_lead, &name, tokens.is_some());
            if is_twice || !agrees || !fits {
                odd.push(Odd { at, is_twice });
            }
            names.push(name);
            found.push(each);
        }
        let groups = vec![0; tensors.len()];
        (Run { donor, tensors, names, columns, found, groups, by_token, keeping }, odd)
    }

    /// The shapes that the layers of the model that gives the config have at the place of a tensor;
    /// none where it has no such place.
    pub fn shapes_in_layers(&self, run: &Run, at: usize, donor_lead: &str) -> Vec<Vec<u64>> {
        let like = self.models[run.donor].tensor(run.tensors[at]);
        let shapes = self.layer_shapes.get(&place_key(&like, donor_lead, &run.names[at]));
        let mut shapes: Vec<_> = shapes.into_iter().flatten().cloned().collect();
        shapes.sort_unstable();
        shapes
    }

    /// Whether a tensor has a shape that the model which gives the config has at its place; of one
    /// whose rows are taken by token, in all but the number of rows.
    fn fits(&self, like: &Tensor<'_>, donor_lead: &str, name: &str, by_token: bool) -> bool {
        let shapes = self.layer_shapes.get(&place_key(like, donor_lead, name));
        let first = usize::from(by_token);
        let rest = like.shape.get(first..);
        shapes.is_none_or(|shapes| shapes.iter().any(|shape| shape.get(first..) == rest))
    }

    /// The models.
    pub fn models(&self) -> &[Arc<Checkpoint>] {
        &self.models
    }

    /// Puts the tensors of a run that the same filters choose into groups: of output names the first,
    /// then of the names in each column. Of each group a tensor that stands for it, and whether
    /// parameters matter to it.
    pub fn group(&self, run: &mut Run, filters: &[Vec<String>]) -> Vec<(usize, bool)> {
        let mut numbers = HashMap::new();
        let mut groups = Vec::new();
        for at in 0..run.tensors.len() {
            let is_float = self.models[run.donor].tensor(run.tensors[at]).dtype.is_float();
            let kept = run.keeping.kept.get(&at).copied();
            let mut key = vec![is_float];
            for (column, filters) in filters.iter().enumerate() {
                if is_float && kept.is_none() && !filters.is_empty() {
                    let name = match column.checked_sub(1) {
                        None => Some(&*run.names[at]),
                        Some(column) => self.source(run, at, column).map(|tensor| tensor.name),
                    };
                    let name = name.unwrap_or_default();
                    key.extend(filters.iter().map(|filter| name.contains(&**filter)));
                }
            }
            run.groups[at] = *numbers.entry((kept, key)).or_insert_with(|| {
                groups.push((at, is_float));
                groups.len() - 1
            });
        }
        groups
    }

    /// The tensor that a run has in a column, if its model has it.
    pub fn source<'a>(&'a self, run: &Run, at: usize, column: usize) -> Option<Tensor<'a>> {
        let model = &self.models[run.columns[column].model];
        run.found[at][column].map(|found| model.tensor(found))
    }

    /// Adds settings that no others equal; their number.
    pub fn add_settings(&mut self, settings: Settings) -> u32 {
        self.builder.add_settings(settings)
    }

    /// Adds the tensors of a run, but for those at `left_out`, with the settings of each group.
    pub fn add(
        &mut self,
        run: &Run,
        settings: &[Option<u32>],
        base: Option<usize>,
        left_out: &HashSet<usize>,
    ) -> Result<()> {
        for at in (0..run.tensors.len()).filter(|at| !left_out.contains(at)) {
            let Some(settings) = settings.get(run.groups[at]).copied().flatten() else { continue };
            let used = run.keeping.used(at);
            let (columns, found) = (&run.columns[used.clone()], &run.found[at][used]);
            let Some(found) = found.iter().copied().collect::<Option<Vec<usize>>>() else {
                continue;
            };
            let models: Vec<usize> = columns.iter().map(|column| column.model).collect();
            let adapted: Vec<Option<u32>> = columns
                .iter()
                .zip(&found)
                .map(|(column, &found)| self.number_adapted(column.model, found))
                .collect();
            let base = base.filter(|_| !run.keeping.kept.contains_key(&at));
            let like = self.models[run.donor].tensor(run.tensors[at]);
            let sources: Vec<Tensor<'_>> = columns
                .iter()
                .zip(&found)
                .map(|(column, &found)| self.models[column.model].tensor(found))
                .collect();
            let dtype = match self.dtype {
                _ if !like.dtype.is_float() => like.dtype,
                Some(dtype) => dtype,
                None => {
                    sources.iter().map(|s| s.dtype).reduce(DType::promote).unwrap_or(like.dtype)
                }
            };
            let has_parameters = self
                .builder
                .settings(settings)
                .ok_or_else(|| Error::internal("a run refers to settings that are not there"))?
                .own
                .first()
                .is_some_and(|own| !own.is_empty());
            let mut shape = like.shape.to_vec();
            let mut rows = vec![None; sources.len()];
            if let (true, Some((tokens, _))) = (run.by_token[at], &self.tokens) {
                shape[0] = tokens.rows();
                let maps = maps(tokens, &models, &mut self.maps, &mut self.builder)?;
                let own: Vec<u64> = sources.iter().map(|source| source.shape[0]).collect();
                for map in maps.iter().filter_map(|&map| self.builder.map(map)) {
                    map.check(&own)?;
                }
                let whole = |(column, (&map, tensor)): (usize, (&u32, &Tensor<'_>))| {
                    let known = self.builder.map(map);
                    let is_whole =
                        known.is_some_and(|map| map.is_whole(column as u32, tensor.shape[0]));
                    (!is_whole).then_some(map)
                };
                rows = maps.iter().zip(&sources).enumerate().map(whole).collect();
            }
            let is_copy = !dtype.is_float()
                || sources.len() == 1
                    && sources[0].dtype == dtype
                    && adapted[0].is_none()
                    && !has_parameters
                    && rows[0].is_none();
            let types = self.types(dtype, &sources, &adapted);
            let files = &self.files;
            let parts: Vec<Part> = models
                .iter()
                .zip(&sources)
                .zip(types.iter().zip(&adapted))
                .map(|((&model, tensor), (&dtype, &adapted))| Part {
                    file: files[model][tensor.file] as u32,
                    start: tensor.start,
                    dtype,
                    rows: tensor.shape.first().copied().unwrap_or(1),
                    adapted,
                })
                .collect();
            let mut inputs = Vec::with_capacity(sources.len());
            for (own, (tensor, map)) in sources.iter().zip(rows).enumerate() {
                let gathered = map.and_then(|map| self.builder.map(map));
                inputs.push(Input {
                    model: models[own],
                    name: tensor.written,
                    dtype: gathered.map_or(types[own], |map| map.dtype(&types)),
                    file: files[models[own]][tensor.file],
                    start: tensor.start,
                    adapted: if map.is_none() { adapted[own] } else { None },
                    rows: map.map(|map| ByToken { map, parts: &parts, own }),
                });
            }
            let name = &run.names[at];
            self.builder.push(name, dtype, &shape, settings, base, inputs.into_iter());
            for (column, &found) in columns.iter().zip(&found) {
                let fate = &mut self.fates[column.model][found];
                *fate = match (*fate, is_copy) {
                    (Fate::Merged, _) | (_, false) => Fate::Merged,
                    (_, true) => Fate::Copied,
                };
            }
        }
        Ok(())
    }

    /// The types that the sources of a tensor of type `dtype` come in: what is adapted in that which
    /// all of the tensor is computed in.
    fn types(&self, dtype: DType, sources: &[Tensor<'_>], adapted: &[Option<u32>]) -> Vec<DType> {
        let is_double = self.builder.plan().in_f64
            || dtype == DType::F64
            || sources.iter().any(|source| source.dtype == DType::F64);
        let computed = if is_double { DType::F64 } else { DType::F32 };
        let each = sources.iter().zip(adapted);
        let plan = self.builder.plan();
        each.map(|(source, adapted)| match adapted.map(|number| plan.adapted(number)) {
            Some(change) if !change.is_view() => computed,
            _ => source.dtype,
        })
        .collect()
    }

    /// The number of what an adapter makes of a tensor of a model, if one does.
    fn number_adapted(&mut self, model: usize, tensor: usize) -> Option<u32> {
        let known = self.models[model].change_of(tensor)?;
        if let Some(&number) = self.adapted.get(&(model, tensor)) {
            return Some(number);
        }
        let files = &self.files[model];
        let adapted = Adapted::clone(known).in_files(|file| files[file as usize] as u32);
        let number = self.builder.add_adapted(adapted);
        self.adapted.insert((model, tensor), number);
        Some(number)
    }

    /// Lays the output out in shards of at most `shard_size` bytes. Returns the plan, and what becomes
    /// of every tensor of every model.
    pub fn finish(self, shard_size: u64) -> Result<(Plan, Vec<Vec<Fate>>)> {
        let plan = self.builder.plan();
        let tensors: Vec<_> =
            plan.tensors().map(|tensor| (tensor.name(), tensor.dtype(), tensor.shape())).collect();
        if tensors.is_empty() {
            return Ok((self.builder.place(&[])?, self.fates));
        }
        let layout = lay_out(&tensors, shard_size, "model")?;
        drop(tensors);
        let mut plan = self.builder.place(&layout.places)?;
        plan.shards = layout.shards;
        Ok((plan, self.fates))
    }
}

impl Keeping {
    /// The columns that a tensor is made of.
    fn used(&self, at: usize) -> Range<usize> {
        self.kept.get(&at).map_or(0..self.inputs, |&column| column..column + 1)
    }
}

impl Run {
    /// The tensors that are made of one column alone, and which it is.
    pub fn kept(&self) -> &HashMap<usize, usize> {
        &self.keeping.kept
    }

    /// How many tensors it has.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// How many models each tensor is made of.
    pub fn columns(&self) -> usize {
        self.columns.len()
    }

    /// The name of a tensor in the output.
    pub fn name(&self, at: usize) -> &str {
        &self.names[at]
    }

    /// Its index in the donor.
    pub fn tensor(&self, at: usize) -> usize {
        self.tensors[at]
    }

    /// The tensors of a group.
    pub fn members(&self, group: usize) -> impl Iterator<Item = usize> {
        (0..self.len()).filter(move |&at| self.groups[at] == group)
    }
}

/// The numbers of the maps of rows that inputs of `models` have.
fn maps<'a>(
    tokens: &TokenRows,
    models: &[usize],
    known: &'a mut HashMap<Vec<usize>, Vec<u32>>,
    builder: &mut Builder,
) -> Result<&'a [u32]> {
    if !known.contains_key(models) {
        let map = |column| Ok(builder.add_map(tokens.map(models, column)?));
        let numbers = (0..models.len()).map(map).collect::<Result<_>>()?;
        known.insert(models.to_vec(), numbers);
    }
    Ok(&known[models])
}

/// What tensors of several layers have in common: the rest of a name behind `lead`.
fn shape_key(name: &str, lead: &str) -> String {
    if lead.is_empty() {
        return name.to_owned();
    }
    let prefix = lead.rsplit_once('.').map_or("", |(prefix, _)| prefix);
    format!("{prefix}.*{}", &name[lead.len()..])
}

fn place_key(like: &Tensor<'_>, donor_lead: &str, name: &str) -> String {
    if donor_lead.is_empty() { name.to_owned() } else { shape_key(like.name, donor_lead) }
}
